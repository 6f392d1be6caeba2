"""The boundary: what all ranks tell each other after a step, in one small all-reduce, and what they agree on by it.

Every rank gets the same sums, so every rank takes the same decision. `raymuon plan` asks here how large it is.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from workers.controls import Pause

DTYPE = torch.float64
"""Of all that is summed: it counts tokens exactly."""


@dataclass(frozen=True)
class Told:
    """What one rank tells of its step: numbers, and 1 for yes."""

    loss: float
    """Summed over its targets, in nats."""
    next_tokens: float
    """Targets of its part of the next step that count."""
    skipped: float
    finite: float
    leave: float
    save: float
    snapshot: float
    """It has written its part."""
    storage_keeps_up: float
    snapshot_seconds: float
    step_seconds: float
    data_seconds: float
    """That it waited for tokens."""


@dataclass(frozen=True)
class Boundary:
    """What all ranks agree on after a step."""

    loss: float
    tokens: int
    """Targets of this step that count."""
    next_tokens: int
    """Of the next one."""
    skipped: bool
    """A gradient was not finite: DeepSpeed changed nothing, on any rank."""
    finite: bool
    """Weights and optimizer state of every rank are."""
    pause: Pause
    snapshot: bool
    """Every rank has written its part of the snapshot."""
    storage_keeps_up: bool
    """Every keeper can take a checkpoint, if one is due."""
    snapshot_seconds: float
    """That the last snapshot held training up, mean over the ranks."""
    step_seconds: float
    """Of this step without its snapshot, mean over the ranks."""
    data_seconds: float
    """Waited for tokens, mean over the ranks."""
    expert_load: Tensor
    """Tokens per expert over the global batch, `[MoE layers, experts]`."""


def num_bytes(expert_loads: int) -> int:
    """Return the bytes of the all-reduce's payload, with so many numbers of tokens per expert."""
    return DTYPE.itemsize * (len(fields(Told)) + expert_loads)


def agree(mine: Told, tokens: int, load: Tensor, ranks: int, all_reduce: Callable[[Tensor], Tensor]) -> Boundary:
    """Tell all ranks of this one's step, and return what all have told.

    Args:
        mine: what this rank tells.
        tokens: targets of this step that count, on all ranks.
        load: tokens per expert that it has seen, `[MoE layers, experts]`.
        ranks: how many come here.
        all_reduce: sums over them.
    """
    scalars = torch.tensor(astuple(mine), dtype=DTYPE)
    sums = all_reduce(torch.cat([scalars, load.flatten().cpu()]))
    every = Told(*sums[: len(scalars)].tolist())
    return Boundary(
        loss=every.loss / tokens,
        tokens=tokens,
        next_tokens=int(every.next_tokens),
        skipped=every.skipped > 0,
        finite=every.finite == ranks,
        pause=Pause(every.leave > 0, every.save > 0),
        snapshot=every.snapshot == ranks,
        storage_keeps_up=every.storage_keeps_up == ranks,
        snapshot_seconds=every.snapshot_seconds / ranks,
        step_seconds=every.step_seconds / ranks,
        data_seconds=every.data_seconds / ranks,
        expert_load=sums[len(scalars) :].view(load.shape),
    )
