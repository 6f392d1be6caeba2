"""How often to take a snapshot, so that it costs no more than its share of the time."""

import math
from dataclasses import dataclass, field


@dataclass
class SnapshotSchedule:
    """When to take a snapshot: every `every` steps, or as often as costs no more than `share` of the time."""

    every: int
    share: float
    last: int
    chosen: int = field(init=False)
    cost: float = 0.0
    step: float = 0.0

    def __post_init__(self) -> None:
        self.chosen = self.every or 1

    def due(self, step: int) -> bool:
        """Tell whether a snapshot of `step` is to be taken."""
        return step >= self.last + self.chosen

    def taken(self, step: int) -> None:
        """Note a snapshot on which all agreed."""
        self.last = step

    def measure(self, step: int, cost: float, seconds: float) -> None:
        """Take in how long `step` took and what the snapshot before it cost; the same numbers on every rank."""
        self.step = _moving(self.step, seconds)
        if self.last == step - 1 and cost:
            self.cost = _moving(self.cost, cost)
        if self.step:
            self.chosen = steps_between(self.every, self.share, self.cost, self.step)


def steps_between(every: int, share: float, cost: float, step: float) -> int:
    """Return the steps between snapshots: so many as are asked for, or as few as their share of the time allows.

    Args:
        every: asked for; 0 for none.
        share: of the time.
        cost: seconds of a snapshot.
        step: seconds of a step.
    """
    return every or max(1, math.ceil(cost / (share * step)))


def _moving(mean: float, value: float) -> float:
    return 0.8 * mean + 0.2 * value if mean else value
