"""One generation in one process: join the group, build the engine, take the state, train."""

from collections.abc import Callable

import torch
from torch.distributed import Store as RendezvousStore
from torch.distributed import TCPStore

from workers.checkpoint.shards import CheckpointReader
from workers.engine import Engine, build_engine, default_device, join_process_group
from workers.loop import Trainer
from workers.state import Counters, load_state
from workers.storage import Store
from workers.task import Membership, Task


def join(member: Membership, task: Task, rendezvous: RendezvousStore | None) -> Engine:
    """Become a member of a generation: join its process group and build an engine with fresh weights.

    Args:
        member: this process's rank and where the rendezvous is.
        task: what will be trained.
        rendezvous: the store, in the process that holds it.
    """
    if rendezvous is None:
        rendezvous = TCPStore(member.host, member.port, member.world_size, is_master=False)
    device = default_device()
    join_process_group(member.rank, member.world_size, rendezvous, device)
    return build_engine(task.model, task.optim, task.train, task.seed, device)


def train(engine: Engine, task: Task, report: Callable[..., None], pause: Callable[[], bool]) -> str:
    """Take the state, train, and return the outcome.

    Args:
        engine: of `join`.
        task: what to train.
        report: takes reports.
        pause: tells whether this process was asked to stop.

    Raises:
        TrainingError: a step was not finite.
        StorageError: a checkpoint or the data could not be read or written.
    """
    return Trainer(task, engine, take_state(engine, task), report, pause).run()


@torch.no_grad()
def take_state(engine: Engine, task: Task) -> Counters:
    """Load the task's checkpoint into the engine, or start at step 0."""
    if task.manifest is None:
        return Counters()
    return load_state(engine, CheckpointReader(Store(task.run_url), task.manifest))
