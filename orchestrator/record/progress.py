"""Where a run is, and who is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from orchestrator.record.events import Event, Tally
from orchestrator.record.metrics import NodeUsage
from orchestrator.record.result import RunResult
from workers.reports import Report, StepDone


@dataclass
class Progress:
    """Where a run is, as its driver knows."""

    step: int = 0
    """Finished last."""
    tokens: int = 0
    validated: int = -1
    committed: int = -1
    seen: int = 0
    """Last step that an earlier driver had told of; those after the checkpoint are trained again."""
    world_size: int = 0


class Recorder(Protocol):
    """Whoever keeps the record of a run and shows it."""

    tally: Tally
    """What adds up, of earlier attempts, too."""

    @property
    def marks(self) -> Mapping[str, int]:
        """The last step of `train` and of `validation` that is on record; -1 without any."""
        ...

    def step(self, report: StepDone, world_size: int) -> None:
        """A step is finished; told once for each, in order."""

    def report(self, report: Report) -> None:
        """Anything else that a worker told."""

    def event(self, event: Event) -> None:
        """Something happened."""

    def stack(self, name: str, text: str) -> None:
        """What a worker that hung was doing."""

    def usage(self, usage: NodeUsage) -> None:
        """How busy a node is."""

    def slow(self, ranks: dict[int, float]) -> None:
        """Ranks that are slower than the others, and how many times."""

    def committed(self, step: int) -> None:
        """A checkpoint counts."""

    def notice(self, text: str) -> None:
        """Something is wrong that does not end the run."""

    def before_commit(self, step: int) -> dict[str, float]:
        """A checkpoint of this step will count: put down what it stands for; return the losses of the step."""
        ...

    def close(self, now: float) -> None:
        """The attempt is over: put down the rest; `now` on the monotonic clock."""

    def complete(self, result: RunResult) -> None:
        """Fill in what the record alone knows of the run."""
