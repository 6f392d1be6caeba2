"""What a rule of widths makes of a model's parameters: initial scale, learning rate and weight decay of each kind."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from optim.config import OptimConfig
from optim.mup import Parametrization
from optim.routing import parameter_groups
from workers.config import ModelConfig
from workers.models import build_empty
from workers.models.language_model import LanguageModel


@dataclass(frozen=True)
class Scaled:
    """Parameters of one kind that are scaled alike."""

    kind: str
    """One of `workers.models.language_model.KINDS`."""
    role: str
    """One of `optim.mup.GROWS`."""
    method: str
    """That trains them."""
    init_std: float | None
    """None of vectors, which are not drawn."""
    lr: float
    """At the peak."""
    decay: float
    """Share of the weights in a step at the peak."""

    @property
    def label(self) -> str:
        """Return its kind, and what tells it from others of that kind."""
        return self.kind if self.role in (self.kind, "hidden", "vector") else f"{self.kind} ({self.role})"

    def __str__(self) -> str:
        std = "" if self.init_std is None else f"std {self.init_std:.3g}, "
        return f"{std}{self.method} {self.lr:.3g}, decay {self.decay:.3g}"


@lru_cache(maxsize=32)
def scaled(model_config: ModelConfig, optim: OptimConfig) -> tuple[Scaled, ...]:
    """Return what the rule makes of each kind, in the order of the parameters; nothing where there is no rule.

    Raises:
        ConfigError: the rule does not go with the model.
    """
    if optim.width_rule == "none":
        return ()
    with torch.device("meta"):
        model = build_empty(model_config)
    rule = model.parametrization(optim)
    return tuple(dict.fromkeys(_all(model, rule, model_config.init_std, optim)))


def _all(model: LanguageModel, rule: Parametrization, init_std: float, optim: OptimConfig) -> Iterator[Scaled]:
    kinds, shapes = model.parameter_kinds(), {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), optim.name, model.tables(), model.matrix_parts(optim.split))
    for group in groups:
        for name, matrices in zip(group["names"], group["matrices"], strict=True):
            shape = shapes[name]
            std = init_std * rule.std(name, *shape[-2:]) if len(shape) > 1 else None
            for rows, columns in dict.fromkeys(matrices or [(1, 1)]):
                step = rule.step(name, group["method"], rows, columns)
                decay = optim.lr * optim.weight_decay * step.decay
                yield Scaled(kinds[name], rule.roles[name], group["method"], std, optim.lr * step.rate, decay)
