"""How far a study is, what it has cost and what it will: pure functions of its trials."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jobs.study.record import Cost

State = Literal["finished", "failed", "running", "waiting", "open"]
"""`open`: begun and neither ended nor running; a study that goes on trains it further."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A trial as far as it is."""

    state: State
    cost: Cost
    step: int
    """The last one that it has trained."""

    @property
    def share(self) -> float:
        """The share of its own steps that are trained."""
        return min(1.0, max(0, self.step - self.cost.first_step + 1) / self.cost.steps)


@dataclass(frozen=True, kw_only=True)
class Account:
    """A study as far as it is known: questions may ask for more when they have answers."""

    finished: int
    failed: int
    running: int
    left: int
    """Waiting, or to go on with."""
    flops: float
    """Of all steps so far, the optimizer's included."""
    expected_flops: float
    """Of all trials that are known."""
    slot_hours: float | None
    """Workers times hours in steps so far; None where no step has been timed."""
    expected_slot_hours: float | None
    eta_s: float | None
    """Until what is known is done; None before there is a speed to tell it from."""

    @property
    def total(self) -> int:
        """Trials that are known."""
        return self.finished + self.failed + self.running + self.left


def account(parts: Iterable[Part], timed: Iterable[tuple[float, float]], slots: int) -> Account:
    """Add up how far a study is.

    Args:
        parts: all trials that are known.
        timed: floating-point operations, and the seconds of workers in which they were done.
        slots: trials at a time.
    """
    parts, timed = [*parts], [*timed]
    count = {state: sum(part.state == state for part in parts) for state in ("finished", "failed", "running")}
    done = sum(part.share * part.cost.flops for part in parts)
    # What a failed trial has not trained, nobody will.
    left = sum((1 - part.share) * part.cost.flops for part in parts if part.state != "failed")
    measured, seconds = (sum(column) for column in zip(*timed, strict=True)) if timed else (0.0, 0.0)
    pace = seconds / measured if measured and seconds else None
    workers = max((part.cost.workers for part in parts), default=1) or 1
    return Account(
        **count,
        left=len(parts) - sum(count.values()),
        flops=done,
        expected_flops=done + left,
        slot_hours=pace and done * pace / 3600,
        expected_slot_hours=pace and (done + left) * pace / 3600,
        eta_s=pace and left * pace / (slots * workers),
    )


def told(now: Account) -> str:
    """Return a line about a study."""
    failed = f", {now.failed} failed" if now.failed else ""
    text = f"{now.finished} of {now.total} trials done{failed}, {now.running} running, {now.left} left"
    cost = f"{now.flops:.2g} of {now.expected_flops:.2g} FLOPs"
    if now.slot_hours is not None and now.expected_slot_hours is not None:
        cost += f", {hours(now.slot_hours)} of {hours(now.expected_slot_hours)} worker time"
    eta = f"; {hours(now.eta_s / 3600)} left" if now.eta_s else ""
    return f"{text}; {cost}{eta}"


def hours(number: float) -> str:
    """Return a length of time for people."""
    seconds = 3600 * number
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{number:.1f} h"
