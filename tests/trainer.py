"""One rank's step loop in a test, without keepers and without a driver."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workers.reports import Report
from workers.task import Place, Task

if TYPE_CHECKING:
    from workers.loop import Trainer


class Told(list[tuple[type[Report], dict[str, Any]]]):
    """What a rank has reported: each report's class and fields."""

    def of(self, kind: type[Report]) -> list[dict[str, Any]]:
        return [fields for told, fields in self if told is kind]


def member_of(rank: int, world_size: int) -> Place:
    return Place(generation=1, rank=rank, world_size=world_size, host="", port=0, keepers=False)


def trainer_of(
    rank: int, world_size: int, task: Task, step: int = 0, restore: bool = False, **controls: Callable
) -> "tuple[Trainer, Told]":
    """Build this rank's engine and step loop, from the seed or from the task's checkpoint, and gather what it tells.

    `step` is the last one that is taken for finished.
    """
    from workers.controls import Controls
    from workers.engine import build_engine, default_device
    from workers.loop import Trainer
    from workers.state import Counters
    from workers.training import take_state

    member, told = member_of(rank, world_size), Told()
    seed = None if restore else task.seed
    engine = build_engine(task.model, task.optim, task.train, seed, default_device())
    counters = take_state(engine, task, member)[0] if restore else Counters(step=step)
    report = lambda kind, **fields: told.append((kind, fields))  # noqa: E731
    return Trainer(task, member, engine, counters, Controls(report=report, **controls)), told
