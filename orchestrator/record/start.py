"""Where the seconds go from the beginning of a command to the end of its first step.

Invariant: the parts follow one another and add up to the whole, whatever runs beside them: each is what everybody has
waited for. They are told by clocks of several nodes, so none ends before the one that goes before it.
"""

import time
from dataclasses import dataclass, field
from itertools import pairwise

import psutil

PARTS = ("command", "checks", "ray", "slots", "processes", "imports", "record", "engine", "validation", "step")
"""In order: the command line with the config and the data; the checks before Ray; Ray itself; room on it; the last
worker's process, and its imports; the run taken over, with MLflow; process group, model, engine and state; what is
validated before the first step; the first step."""


@dataclass
class Start:
    """The parts of a start, as they end; one that has not ended counts as part of the next that has."""

    began: float = field(default_factory=time.time)
    """In seconds since the epoch."""
    _ends: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_process(cls) -> "Start":
        """Return the start that this process' own beginning is the beginning of."""
        return cls(psutil.Process().create_time())

    def end(self, part: str, at: float | None = None) -> None:
        """Note that a part has ended, now or `at` so many seconds since the epoch; only the first time counts."""
        assert part in PARTS, part
        if "step" not in self._ends:
            self._ends.setdefault(part, time.time() if at is None else at)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each part, in order; empty before the first step has ended."""
        if "step" not in self._ends:
            return {}
        last = max(self.began, self._ends["step"])
        ends = [self.began]
        for part in PARTS:
            ends.append(min(last, max(ends[-1], self._ends.get(part, ends[-1]))))
        return {part: end - begin for part, (begin, end) in zip(PARTS, pairwise(ends), strict=True)}
