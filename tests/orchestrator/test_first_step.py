"""The parts of a start add up, whatever clocks tell."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.record.start import PARTS, Start

TIMES = st.dictionaries(st.sampled_from(PARTS), st.floats(-1e3, 1e6))


def test_each_part_lasts_from_the_end_of_the_one_before():
    start = Start(100.0)
    for number, part in enumerate(PARTS, 1):
        start.end(part, 100.0 + number * number)
    assert start.seconds == {part: 2 * number + 1 for number, part in enumerate(PARTS)}


@given(st.floats(0, 1e6), TIMES, st.floats(0, 1e6))
def test_the_parts_are_all_there_and_add_up_to_the_whole(began, ends, last):
    start = Start(began)
    for part, at in ends.items():
        if part != "step":
            start.end(part, at)
    assert start.seconds == {}, "no first step has ended"
    start.end("step", last)
    assert tuple(start.seconds) == PARTS and min(start.seconds.values()) >= 0
    assert sum(start.seconds.values()) == pytest.approx(max(0.0, last - began), abs=1e-6)


def test_what_ends_again_or_later_does_not_count():
    start = Start(0.0)
    start.end("engine", 2.0)
    start.end("engine", 5.0)
    start.end("step", 6.0)
    start.end("validation", 6.5)
    assert (start.seconds["engine"], start.seconds["validation"], start.seconds["step"]) == (2.0, 0.0, 4.0)
