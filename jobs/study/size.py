"""What a trial's model and optimizer cost, counted from its config: parameters and floating-point operations."""

from dataclasses import dataclass
from functools import lru_cache

from optim.config import OptimConfig
from orchestrator.config import RunConfig
from workers.config import ModelConfig

ADAMW_OPERATIONS = 14
"""Per element and step: two moments (7), their correction and quotient (5), decay and update (2)."""
MUON_OPERATIONS = 8
"""The same beside the orthogonalization: momentum (3), look-ahead (2), scale, decay and update (3)."""

SHAPING = ("name", "split", "ns_steps", "ns_coefficients", "ns_form", "ns_dtype")
"""Keys of the optimizer that its cost depends on: trials that differ in others are counted once."""


@dataclass(frozen=True)
class Size:
    """Of one model under one optimizer."""

    parameters: int
    """All but embedding and head."""
    all_parameters: int
    flops_per_token: float
    """Of the model, forward and backward: what MFU counts (docs/telemetry.md)."""
    optimizer_flops: float
    """Of a step."""


def size_of(config: RunConfig) -> Size:
    """Return what a config's model and optimizer cost."""
    optim = config.optim
    shaped = {key: getattr(optim, key) for key in SHAPING}
    return _size(config.model, OptimConfig(**shaped), config.train.seq_len)


@lru_cache(maxsize=128)
def _size(model: ModelConfig, optim: OptimConfig, seq_len: int) -> Size:
    import torch  # A second; the driver does without until there is something to count.

    from jobs.planning.state import layout_of
    from workers.models import build_empty

    layout = layout_of(model, optim, 1)
    with torch.device("meta"):
        tables = build_empty(model).tables()
    tabled, operations = 0, 0.0
    for group in layout.groups:
        muon = group.method == "muon"
        for name, numel, matrices in zip(group.layout.names, group.layout.numels, group.matrices, strict=True):
            tabled += numel if name in tables else 0
            operations += numel * (MUON_OPERATIONS if muon else ADAMW_OPERATIONS)
            operations += sum(optim.operations(*matrix) for matrix in matrices) if muon else 0
    return Size(layout.parameters - tabled, layout.parameters, layout.flops_per_token(seq_len), operations)
