"""How the optimizer shares its matrices out over the ranks."""

from jobs.planning.state import layout_of
from optim.config import OptimConfig
from optim.plan import PlanFigures
from orchestrator.config import RunConfig
from workers.common.errors import ConfigError

BF16 = 2
"""Bytes of a parameter where no device is named."""


def orthogonalization(config: RunConfig, gpus: int) -> PlanFigures:
    """Plan the matrices of the config's model over so many GPUs.

    Raises:
        ConfigError: there is nothing to plan.
    """
    layout = layout_of(config.model, config.optim, config.train.seq_len, gpus)
    figures = layout.plan_figures(config.optim, BF16, wire_bytes(config.optim, "cuda"))
    if figures is None:
        raise ConfigError(f"optim.name={config.optim.name}: no matrix is orthogonalized")
    return figures


def wire_bytes(optim: OptimConfig, kind: str) -> int:
    """Return the bytes of an element of a straddler on its way to its owner, between devices of a kind."""
    return {"auto": 2 if kind == "cuda" else 4, "bf16": 2, "fp32": 4}[optim.wire_dtype]
