"""A generation of the group: why it is formed, what it goes on from, and how far it has come."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.config import RunConfig
from orchestrator.record.events import Reason, Source
from workers.recipe import TrainConfig

Decide = Callable[[RunConfig, Sequence[str], Sequence[str]], TrainConfig]
"""Returns how workers on nodes, one for each rank, with devices of some names, train a config: nothing is automatic."""


def plainly(config: RunConfig, nodes: Sequence[str], devices: Sequence[str]) -> TrainConfig:
    """Decide for as little as possible to be computed twice, whatever memory it takes."""
    return config.train.plain()


@dataclass
class Change:
    """Why the next generation is formed, and since when nothing has been trained."""

    reason: Reason
    cause: str = ""
    began: float = field(default_factory=time.time)
    found: float = field(default_factory=time.monotonic)
    late_s: float = field(init=False)
    """From its beginning to when it was found."""

    def __post_init__(self) -> None:
        self.late_s = max(0.0, time.time() - self.began)

    def seconds(self, resumed: float, step_s: float) -> float:
        """Return the seconds from its beginning to `resumed`, when a step began that took `step_s` and ended just now.

        Nodes tell the time more exactly than we could find out, but a clock may have been set meanwhile.
        """
        told, most = resumed - self.began, self.late_s + time.monotonic() - self.found
        return told if 0.0 <= told <= most else max(0.0, most - step_s)


@dataclass
class Generation:
    """The generation that is being led, or the last one."""

    number: int = 0
    members: list[int] = field(default_factory=list)
    """Numbers of its workers, in rank order."""
    source: Source = "start"
    restored: int = 0
    """The step that it goes on from."""
    redone: int = 0
    """Steps after that which were finished once before."""
    reached: int = 0
    """The last step that it has finished, be it a new one or one that is redone."""
    ready: set[int] = field(default_factory=set)
    """Ranks that have their state."""
    storage_bytes: int = 0
    """That they have read for it."""

    @property
    def begun(self) -> bool:
        """Tell whether it has finished a step."""
        return self.reached > self.restored

    @property
    def in_step(self) -> bool:
        """Tell whether every rank has its state: from then on it is in a step, if only in its first."""
        return len(self.ready) == len(self.members)
