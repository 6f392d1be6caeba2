"""Clocks are set while runs go on: what adds up stays what it was."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.generation import Change
from orchestrator.record.events import Elapsed, Tally

DAY = 86_400.0
JUMPS = st.sampled_from([0.0, -DAY, DAY, -3600.0, 56 * 365 * DAY])


class Clock:
    """The wall's, which may be set, and the true time."""

    def __init__(self) -> None:
        self.true, self.wall = 0.0, 1e9

    def go(self, seconds: float, jump: float = 0.0) -> None:
        self.true += seconds
        self.wall += seconds + jump


@given(st.lists(st.tuples(JUMPS, JUMPS), min_size=1, max_size=5))
def test_a_drivers_own_time_is_true_whatever_becomes_of_the_clock(attempts):
    """Each driver lives for 100 s and ships twice, and its clock is set before each; drivers follow at once."""
    clock, elapsed = Clock(), Elapsed()
    for first, second in attempts:
        elapsed.begin(clock.wall)
        for uptime, jump in ((50.0, first), (100.0, second)):
            clock.go(50.0, jump)
            elapsed.live(clock.wall, uptime)
    elapsed.begin(clock.wall)
    assert elapsed.seconds == pytest.approx(clock.true)


@given(JUMPS)
def test_a_clock_that_is_set_back_between_drivers_takes_no_time_away(jump):
    elapsed = Elapsed()
    elapsed.begin(1e9)
    elapsed.live(1e9 + 100, 100.0)
    elapsed.begin(1e9 + 100 + 20 + min(jump, 0.0))
    assert elapsed.seconds == (120.0 if jump >= 0 else 100.0)


def test_a_journal_without_uptimes_counts_from_driver_to_driver():
    elapsed = Elapsed()
    for at in (1e9, 1e9 + 50, 1e9 - DAY, 1e9 - DAY + 30):
        elapsed.begin(at)
    assert elapsed.seconds == 80.0


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.floats(0, 1e9))
def test_goodput_is_a_share(now, before, productive):
    assert 0.0 <= Tally(began=0.0, before_s=before, productive_s=productive).goodput(now) <= 1.0


@pytest.mark.parametrize(("jump", "seconds"), [(0.0, 8.0), (-DAY, 8.0), (DAY, 8.0), (60.0, 8.0), (-8.5, 8.0)])
def test_the_seconds_of_a_recovery_are_never_negative_nor_those_of_a_clock(monkeypatch, jump, seconds):
    """A fault 2 s before it was found; 7 s later a step has ended that took 1 s, and was told at once."""
    now = {"monotonic": 100.0, "time": 1e9}
    monkeypatch.setattr(time, "monotonic", lambda: now["monotonic"])
    monkeypatch.setattr(time, "time", lambda: now["time"])
    change = Change("fault", "x", began=1e9 - 2.0, found=100.0)
    now = {"monotonic": 107.0, "time": 1e9 + 7.0 + jump}
    assert change.seconds(now["time"] - 1.0, 1.0) == pytest.approx(seconds)
