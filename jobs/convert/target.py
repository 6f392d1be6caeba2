"""Which mixture a dense model becomes: pure, from sizes alone."""

from dataclasses import dataclass, fields
from typing import Literal

from optim.checks import ConfigProblems
from workers.common.errors import ConfigError
from workers.config import (
    EXPERT_WIDTH,
    LlamaConfig,
    LlamaMoeConfig,
    MixtureConfig,
    ModelConfig,
    MoonlightConfig,
)

Method = Literal["moefy", "upcycle"]
"""The neurons of a dense layer are shared out among its experts (arXiv 2110.01786), or each of its experts is a copy of
it (arXiv 2212.05055)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What was asked of the mixture."""

    method: Method
    experts: int
    active: int | None = None
    """Experts that a token visits; None: half of them, of copies two."""
    shared: int = 0
    """Experts' worth of neurons that every token visits; of `moefy` alone."""
    dense_layers: int = 0
    """The first layers stay as they are."""

    @property
    def chosen(self) -> int:
        """Experts that a token visits."""
        if self.active is not None:
            return self.active
        return max(1, self.experts // 2) if self.method == "moefy" else min(2, self.experts)


def mixture_of(model: ModelConfig, shape: Shape, where: str) -> MixtureConfig:
    """Return the settings of the mixture.

    Gates sum up to `routed_scaling_factor`. Copies need a sum of 1, whoever is chosen; parts, of which the layer is the
    sum, need 1 each.

    Args:
        model: dense.
        shape: that was asked for.
        where: what names the model in messages.

    Raises:
        ConfigError: the model is no dense one, or cannot be cut so.
    """
    if not isinstance(model, LlamaConfig | LlamaMoeConfig | MoonlightConfig):
        raise ConfigError(
            f"{where}: a {model.name} is not converted; llama and moonlight are (docs/commands/convert.md)"
        )
    if not isinstance(model, LlamaConfig) and model.num_dense_layers < model.num_layers:
        raise ConfigError(
            f"{where}: it is a mixture of experts already, in {model.num_layers - model.num_dense_layers} of its "
            f"{model.num_layers} layers; a dense model is converted, as a {model.name} with "
            f"num_dense_layers={model.num_layers} is"
        )
    _check(model, shape)
    kind = MoonlightConfig if isinstance(model, MoonlightConfig) else LlamaMoeConfig
    same = [key.name for key in fields(kind) if key.name != "name" and hasattr(model, key.name)]
    experts = {
        "num_dense_layers": shape.dense_layers,
        "moe_intermediate_size": _width(model.intermediate_size, shape, where),
        "num_experts": shape.experts,
        "num_experts_per_token": shape.chosen,
        "num_shared_experts": shape.shared,
        "routed_scaling_factor": float(shape.chosen) if shape.method == "moefy" else 1.0,
    }
    try:
        return kind(**{**{name: getattr(model, name) for name in same}, **experts})
    except ConfigProblems as error:
        raise ConfigError(f"{where}: {error}") from error


def _check(model: MixtureConfig | LlamaConfig, shape: Shape) -> None:
    """Refuse what could be no mixture of any width."""
    if shape.experts < 2:
        raise ConfigError(f"--experts {shape.experts}: 2 is the least")
    if not 1 <= shape.chosen <= shape.experts:
        raise ConfigError(
            f"--active {shape.chosen}: a token visits 1 to {shape.experts} of the --experts {shape.experts}"
        )
    if shape.shared < 0:
        raise ConfigError(f"--shared {shape.shared}: 0 is the least")
    if not 0 <= shape.dense_layers < model.num_layers:
        raise ConfigError(
            f"--dense-layers {shape.dense_layers}: 0 to {model.num_layers - 1} of the {model.num_layers} layers may "
            "stay dense"
        )


def _width(whole: int, shape: Shape, where: str) -> int:
    """Return the width of an expert.

    Raises:
        ConfigError: none fits.
    """
    if shape.method == "upcycle":
        if whole % EXPERT_WIDTH:
            raise ConfigError(
                f"{where}: its intermediate_size {whole} is no multiple of {EXPERT_WIDTH}, as the width of an expert "
                "has to be; it cannot be upcycled"
            )
        return whole
    parts = shape.experts + shape.shared
    if whole % (parts * EXPERT_WIDTH):
        fitting = [number for number in range(2, whole // EXPERT_WIDTH + 1) if whole % (number * EXPERT_WIDTH) == 0]
        told = f"{', '.join(map(str, fitting))} fit" if fitting else "no number fits"
        raise ConfigError(
            f"--experts {shape.experts}{f' and --shared {shape.shared}' if shape.shared else ''}: {where} has an "
            f"intermediate_size of {whole}, which is not cut into {parts} parts of which the width is a multiple of "
            f"{EXPERT_WIDTH}; {told}"
        )
    return whole // parts
