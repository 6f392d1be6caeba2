"""The state of a run between storage and a live engine, keyed by parameter name and offset.

Everything that decides the next step is here: master weights, momentum and moments, router biases, and the counters.
The learning rate, the data order and all randomness are pure functions of the counters and the seed, so there is no
scheduler, sampler or generator state to keep. On loading, every rank, old or new, takes its intervals from the same
checkpoint; live state is never trusted.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from optim.layout import Fragment
from workers.checkpoint.manifest import BUFFER, Entry
from workers.checkpoint.shards import CheckpointReader
from workers.engine import Engine


@dataclass(slots=True)
class Counters:
    """Where a run is."""

    step: int = 0
    """Finished optimizer steps; with the global batch it is also the data position."""
    tokens: int = 0
    """Tokens trained on."""
    applied_steps: int = 0
    """Steps in AdamW's bias correction."""

    def as_dict(self) -> dict[str, int]:
        """Return the manifest's form."""
        return asdict(self)


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the shape of every parameter and replicated buffer."""
    named = {**dict(engine.model.named_parameters()), **_replicated(engine)}
    return {name: list(tensor.shape) for name, tensor in named.items()}


def local_state(engine: Engine) -> dict[Entry, np.ndarray]:
    """Return what this rank contributes to a checkpoint: its shard, and on rank 0 all that is replicated.

    The arrays are flat fp32 views of live memory on a CPU: write them before the next step changes them.
    """
    state: dict[Entry, np.ndarray] = {}
    for group in engine.optimizer.flat_state(engine.rank):
        for kind, tensor in group.tensors.items():
            flat = tensor.detach().cpu().numpy()
            for fragment in group.fragments:
                entry = Entry(kind, fragment.name, fragment.start, fragment.length)
                state[entry] = flat[fragment.offset : fragment.offset + fragment.length]
    if engine.rank == 0:
        for name, buffer in _replicated(engine).items():
            state[Entry(BUFFER, name, 0, buffer.numel())] = buffer.detach().flatten().cpu().numpy()
    return state


def load_state(engine: Engine, reader: CheckpointReader) -> Counters:
    """Fill the engine from a checkpoint of any world size.

    Raises:
        StorageError: a shard is damaged or something is missing.
    """
    for group in engine.optimizer.flat_state(engine.rank):
        for kind, tensor in group.tensors.items():
            flat = np.zeros(tensor.numel(), dtype=np.float32)  # The padding at the end stays zero.
            reader.fill(kind, group.fragments, flat)
            tensor.copy_(torch.from_numpy(flat))
    for name, buffer in _replicated(engine).items():
        flat = np.empty(buffer.numel(), dtype=np.float32)
        reader.fill(BUFFER, [Fragment(name, 0, flat.size, 0)], flat)
        buffer.copy_(torch.from_numpy(flat).view_as(buffer))
    counters = Counters(**reader.manifest.counters)
    engine.optimizer.applied_steps = counters.applied_steps
    engine.publish_weights()
    return counters


def _replicated(engine: Engine) -> dict[str, Tensor]:
    """Return the buffers that every rank holds alike and that training changes."""
    kept = engine.model.state_dict().keys()
    return {name: buffer for name, buffer in engine.model.named_buffers() if name in kept}
