"""The state of a run between storage and a live engine, keyed by parameter name and offset.

Everything that decides the next step is here: master weights, momentum and moments, router biases, and the counters.
The learning rate, the data order and all randomness are pure functions of the counters and the seed, so there is no
scheduler, sampler or generator state to keep. On loading, every rank, old or new, takes its intervals from the same
checkpoint; live state is never trusted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ReduceOp

from optim.layout import Fragment
from workers.checkpoint.manifest import BUFFER, WEIGHT
from workers.engine import Engine
from workers.models.layers import replicated
from workers.snapshots.kept import ShardMap


class Reader(Protocol):
    """A checkpoint or a snapshot."""

    def fill(self, kind: str, want: Iterable[Fragment], target: np.ndarray) -> None:
        """Fill the wanted fragments of the flat fp32 `target`."""


@dataclass(frozen=True, slots=True)
class WeightsOnly:
    """A checkpoint without its optimizer state: what a new run begins with where `train.init_state` says so."""

    checkpoint: Reader

    def fill(self, kind: str, want: Iterable[Fragment], target: np.ndarray) -> None:
        """Fill the wanted fragments, with zeros where they are of the optimizer."""
        if kind in (WEIGHT, BUFFER):
            self.checkpoint.fill(kind, want, target)
        else:
            target[:] = 0


@dataclass(slots=True)
class Counters:
    """Where a run is."""

    step: int = 0
    """Finished optimizer steps; with the global batch it is also the data position."""
    tokens: int = 0
    """Tokens trained on."""
    applied_steps: int = 0
    """Steps in AdamW's bias correction."""
    skipped: int = 0
    """Steps whose gradient was not finite: their samples are used up, the weights are as before."""
    skipped_in_a_row: int = 0
    """Of these, the last ones without a good step in between."""

    def as_dict(self) -> dict[str, int]:
        """Return the manifest's form."""
        return asdict(self)


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the shape of every parameter and replicated buffer."""
    named = {**dict(engine.model.named_parameters()), **replicated(engine.model)}
    return {name: list(tensor.shape) for name, tensor in named.items()}


def shard_map(engine: Engine, world_size: int, rank: int) -> ShardMap:
    """Return what lies where in the snapshot of any rank at any world size."""
    sizes = {name: buffer.numel() for name, buffer in replicated(engine.model).items()}
    return ShardMap.of(engine.optimizer.layouts(world_size), sizes, rank)


def overlapping(engine: Engine, world_size: int) -> set[int]:
    """Return the ranks of a group of any size in whose shards there is anything of this rank's."""
    ours, theirs = engine.optimizer.layouts(engine.world_size), engine.optimizer.layouts(world_size)
    return {rank for (one, _), (other, _) in zip(ours, theirs, strict=True) for rank in one.sharing(engine.rank, other)}


def shard_tensors(engine: Engine) -> Iterator[Tensor]:
    """Yield this rank's flat tensors, in the order of its `shard_map`."""
    for group in engine.optimizer.flat_state(engine.rank):
        yield from group.tensors.values()


def replicated_tensors(engine: Engine) -> Iterable[Tensor]:
    """Return what every rank holds alike, in the order of its `shard_map`."""
    return replicated(engine.model).values()


@torch.no_grad()
def load_state(engine: Engine, reader: Reader, counters: Counters) -> None:
    """Fill the engine from a checkpoint or a snapshot of any world size.

    Raises:
        StorageError: something is damaged or missing.
    """
    for group in engine.optimizer.flat_state(engine.rank):
        for kind, tensor in group.tensors.items():
            flat = np.zeros(tensor.numel(), dtype=np.float32)  # The padding at the end stays zero.
            reader.fill(kind, group.fragments, flat)
            tensor.copy_(torch.from_numpy(flat))
    for name, buffer in replicated(engine.model).items():
        flat = np.empty(buffer.numel(), dtype=np.float32)
        reader.fill(BUFFER, [Fragment(name, 0, flat.size, 0)], flat)
        buffer.copy_(torch.from_numpy(flat).view_as(buffer))
    engine.optimizer.applied_steps = counters.applied_steps
    engine.publish_weights()


def is_finite(engine: Engine) -> bool:
    """Tell whether all that this rank holds is finite, at the cost of one sum over it.

    A sum that is not may be one of large numbers: `first_not_finite` looks at each.
    """
    tensors = [*shard_tensors(engine), *replicated_tensors(engine)]
    return bool(torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors]).isfinite().all())


def first_not_finite(engine: Engine) -> str:
    """Name the first of all ranks' weights, optimizer state and buffers that is not finite; empty where all are.

    All ranks come here together.
    """
    layouts = engine.optimizer.layouts(1)
    names = [f"{kind} of {name}" for layout, kinds in layouts for kind in kinds for name in layout.names]
    names += replicated(engine.model)
    mine = "" if is_finite(engine) else _not_finite(engine)
    index = names.index(mine) if mine else len(names)
    first = int(engine.all_reduce(torch.tensor([index]), ReduceOp.MIN).item())
    return [*names, ""][first]


def _not_finite(engine: Engine) -> str:
    """Name the first that is not finite of what this rank holds."""
    for group in engine.optimizer.flat_state(engine.rank):
        for kind, tensor in group.tensors.items():
            for fragment in group.fragments:
                if not tensor[fragment.offset : fragment.offset + fragment.length].isfinite().all():
                    return f"{kind} of {fragment.name}"
    return next((name for name, buffer in replicated(engine.model).items() if not buffer.isfinite().all()), "")
