"""One generation in one process: join the group, build the engine, take the state, train, take it all down."""

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


def train(
    member: Membership,
    task: Task,
    rendezvous: RendezvousStore | None,
    report: Callable[..., None],
    pause: Callable[[], bool],
) -> tuple[str, int]:
    """Train as a member of a generation; return the outcome and the last finished step.

    Args:
        member: this process's rank and where the rendezvous is.
        task: what to train.
        rendezvous: the store, in the process that holds it.
        report: takes reports.
        pause: tells whether this process was asked to stop.

    Raises:
        TrainingError: a step was not finite.
        StorageError: a checkpoint or the data could not be read or written.
    """
    if rendezvous is None:
        rendezvous = TCPStore(member.host, member.port, member.world_size, is_master=False)
    device = default_device()
    join_process_group(member.rank, member.world_size, rendezvous, device)
    engine = build_engine(task.model, task.optim, task.train, task.seed, device)
    try:
        counters = take_state(engine, task)
        outcome = Trainer(task, engine, counters, report, pause).run()
        return outcome, counters.step
    finally:
        engine.destroy()


@torch.no_grad()
def take_state(engine: Engine, task: Task) -> Counters:
    """Load the task's checkpoint into the engine, or start at step 0."""
    if task.manifest is None:
        return Counters()
    return load_state(engine, CheckpointReader(Store(task.run_url), task.manifest))
