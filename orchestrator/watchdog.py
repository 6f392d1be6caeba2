"""Who hangs and who is slow: pure, with a clock that is passed in and that leaves the driver's own pauses out."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from workers.phases import Phase
from workers.reports import Mark

PATIENCE = 10.0
"""How much longer patient phases may take, and the first two steps that a driver ever sees."""
SLACK = 4.0
"""How much longer than the slowest that was ever finished a phase may take."""
SLOW = 1.5
"""A rank is slow that takes this much longer than the median."""


@dataclass
class Attention:
    """A clock that stands still while the driver does: others' silence during a pause of its own proves nothing.

    A machine that swaps, or a driver that gets no processor for ten seconds, would otherwise find all members silent
    when it wakes, before the first of their answers has come through, and kill them.
    """

    now: float = 0.0
    """Seconds that the driver has paid attention."""
    looked: float | None = None

    def look(self, at: float) -> float:
        """Note that the driver is awake at `at`, of any clock that does not jump, and return `now`."""
        if self.looked is not None:
            self.now += min(at - self.looked, PAUSE_S)
        self.looked = at
        return self.now


PAUSE_S = 1.0
"""More time than this between two looks of the driver is a pause."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A rank that holds everybody up, why, and for how long it has done so."""

    rank: int
    reason: str
    since_s: float


@dataclass
class Watchdog:
    """Finds who is stopped (no answer) and who is stuck (answers, but does not get on) among the ranks of a generation.

    All ranks stand still when one does: the guilty are those that have come the least far.
    """

    hang_s: float
    heard: dict[int, float] = field(default_factory=dict)
    marks: dict[int, Mark] = field(default_factory=dict)
    """Of every rank that is watched, from the beginning: one without a mark would hide all others' hangs."""
    began: float = 0.0
    first_step: int | None = None
    warm: bool = False
    """Whether a second step was ever finished: from then on it is known how long a phase takes."""
    slowest_s: float = 0.0
    """Longest phase that was finished, first steps left out: they compile and touch new memory."""
    size: int = 0
    """Ranks of the generation."""

    def begin(self, ranks: Iterable[int], now: float) -> None:
        """Start the clocks of a generation; fewer ranks may each take longer, since more of the work is theirs."""
        self.heard = dict.fromkeys(ranks, now)
        self.began, self.first_step = now, None
        self.marks = dict.fromkeys(self.heard, self._absent(now))
        self.slowest_s *= max(1.0, self.size / len(self.heard))
        self.size = len(self.heard)

    def observe(self, rank: int, mark: Mark | None, now: float) -> None:
        """Take in the answer to a poll; without a mark of this generation the rank has yet to begin."""
        self.heard[rank] = now
        mark = mark or self._absent(now)
        before, self.marks[rank] = self.marks[rank], mark
        if mark.step > 0:
            self.first_step = mark.step if self.first_step is None else self.first_step
            self.warm = self.warm or mark.step > self.first_step + 1
            if self.first_step < before.step and not before.phase.patient:
                # Of a phase that goes on this says nothing: a hang must not excuse itself.
                finished = _position(mark) != _position(before) or mark.age_s < before.age_s
                self.slowest_s = max(self.slowest_s, before.age_s if finished else 0.0)

    def forget(self, rank: int) -> None:
        """Stop watching a rank that has left."""
        self.heard.pop(rank, None)
        self.marks.pop(rank, None)

    def suspects(self, now: float) -> list[Suspect]:
        """Return who has to go."""
        silent = [
            Suspect(rank, f"gave no sign of life for {now - at:.1f} s (recovery.hang_s)", now - at)
            for rank, at in self.heard.items()
            if now - at > self.hang_s
        ]
        if silent:
            return silent
        if not self.marks:
            return []
        behind = min(map(_position, self.marks.values()))
        guilty = {rank: mark for rank, mark in self.marks.items() if _position(mark) == behind}
        # As they said themselves: who has not been heard for a moment may have got on meanwhile.
        if min(mark.age_s for mark in guilty.values()) <= max(map(self._limit, guilty.values())):
            return []
        if len(guilty) == len(self.marks) > 1:
            # Everybody is in the same place, so most of them wait there, and who computes is the one.
            busiest = max(guilty, key=lambda rank: (guilty[rank].cpu, rank))
            guilty = {busiest: guilty[busiest]}
        return [
            Suspect(
                rank,
                f"has been in phase {mark.phase.value} of step {mark.step} for {mark.age_s:.1f} s without getting on, "
                f"which recovery.hang_s={self.hang_s:g} allows for {self._limit(mark):.0f} s",
                mark.age_s,
            )
            for rank, mark in guilty.items()
        ]

    def slow(self) -> dict[int, float]:
        """Return the ranks that compute slower than the median, and how many times slower."""
        busy = {rank: mark.busy_s for rank, mark in self.marks.items() if mark.busy_s}
        if len(busy) < 2:
            return {}
        ordered = sorted(busy.values())
        median = ordered[(len(ordered) - 1) // 2]
        return {rank: seconds / median for rank, seconds in busy.items() if seconds > SLOW * median}

    def _limit(self, mark: Mark) -> float:
        limit = max(self.hang_s, SLACK * self.slowest_s)
        return limit * PATIENCE if not self.warm or mark.phase.patient else limit

    def _absent(self, now: float) -> Mark:
        return Mark(generation=0, step=-1, phase=Phase.IDLE, age_s=now - self.began, busy_s=0.0, cpu=0.0)


def _position(mark: Mark) -> tuple[int, int]:
    return mark.step, mark.phase.order
