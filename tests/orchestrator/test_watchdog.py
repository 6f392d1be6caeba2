"""Who is silent, who is stuck and who is slow, told from marks at times that are made up."""

from types import SimpleNamespace

import pytest

from orchestrator.watchdog import Attention, Watchdog
from workers.member import Member
from workers.phases import Phase
from workers.reports import Mark


def mark(phase: Phase, step: int, age_s: float = 0.0, busy_s: float = 0.1, cpu: float = 0.0) -> Mark:
    return Mark(generation=1, step=step, phase=phase, age_s=age_s, busy_s=busy_s, cpu=cpu)


def watchdog(*ranks: tuple[Phase, int], at: float = 10.0) -> Watchdog:
    """Ranks that have been seen training for a while, and at `at` stand at the given phases."""
    dog = Watchdog(hang_s=8.0)
    dog.begin(range(len(ranks)), 0.0)
    for rank, (phase, step) in enumerate(ranks):
        for step in (1, 2, 3):
            dog.observe(rank, mark(Phase.COMPUTE, step), float(step))
        dog.observe(rank, mark(phase, step), at)
    return dog


def test_silence_is_found():
    dog = watchdog((Phase.REDUCE, 5), (Phase.REDUCE, 5))
    dog.observe(0, mark(Phase.REDUCE, 5, 8.1), 18.1)
    (suspect,) = dog.suspects(18.1)
    assert suspect.rank == 1 and suspect.reason == "gave no sign of life for 8.1 s (recovery.hang_s)"


def test_of_those_that_stand_still_the_one_that_came_the_least_far_is_guilty():
    dog = watchdog((Phase.REDUCE, 5), (Phase.COMPUTE, 5), (Phase.REDUCE, 5))
    assert dog.suspects(17.9) == []
    for rank, phase in enumerate((Phase.REDUCE, Phase.COMPUTE, Phase.REDUCE)):
        dog.observe(rank, mark(phase, 5, 8.5), 18.5)
    (suspect,) = dog.suspects(18.5)
    assert suspect.rank == 1 and suspect.reason == (
        "has been in phase compute of step 5 for 8.5 s without getting on, which recovery.hang_s=8 allows for 8 s"
    )


def test_where_all_are_in_the_same_phase_the_one_that_computes_is_guilty():
    dog = watchdog((Phase.REDUCE, 5), (Phase.REDUCE, 5), (Phase.REDUCE, 5))
    for rank in range(3):
        dog.observe(rank, mark(Phase.REDUCE, 5, 8.5, cpu=0.9 if rank == 1 else 0.01), 18.5)
    assert [suspect.rank for suspect in dog.suspects(18.5)] == [1]


def test_slow_steps_and_first_steps_get_more_time():
    dog = watchdog((Phase.REDUCE, 5))
    dog.observe(0, mark(Phase.REDUCE, 5, 6.0), 16.0)
    dog.observe(0, mark(Phase.COMPUTE, 6, 0.1), 16.5)
    dog.observe(0, mark(Phase.REDUCE, 6, 23.0), 40.0)
    assert dog.suspects(40.0) == [], "the last one took 6 s: 23 s are no hang"
    dog.observe(0, mark(Phase.REDUCE, 6, 25.0), 42.0)
    assert len(dog.suspects(42.0)) == 1
    young = Watchdog(hang_s=8.0)
    young.begin([0], 0.0)
    young.observe(0, mark(Phase.RESTORE, -1, 30.0), 30.0)
    assert young.suspects(30.0) == []
    young.observe(0, mark(Phase.COMPUTE, 1, 79.0), 109.0)
    assert young.suspects(109.0) == [], "the first step compiles and warms up"
    young.observe(0, mark(Phase.COMPUTE, 1, 81.0), 111.0)
    assert len(young.suspects(111.0)) == 1
    young.observe(0, mark(Phase.COMPUTE, 2, 0.1), 112.0)
    young.observe(0, mark(Phase.REDUCE, 2, 79.0), 191.0)
    assert young.suspects(191.0) == [], "nobody knows yet how long it takes once it is warm"
    assert young.slowest_s < 1, "what the first step took is no measure"


def test_who_was_not_heard_for_a_moment_may_have_got_on():
    dog = watchdog((Phase.REDUCE, 5), (Phase.REDUCE, 5))
    dog.observe(0, mark(Phase.REDUCE, 5, 7.0), 17.0)
    dog.observe(1, mark(Phase.COMPUTE, 6, 0.5), 19.0)
    assert dog.suspects(19.0) == []


def test_after_a_recovery_a_hang_in_the_first_step_is_found_as_fast_as_any():
    dog = watchdog((Phase.COMPUTE, 5))
    dog.begin([0], 100.0)
    dog.observe(0, mark(Phase.RESTORE, -1, 30.0), 130.0)
    assert dog.suspects(130.0) == [], "the state of a large model takes its time"
    dog.observe(0, mark(Phase.GATHER, 6, 8.5), 140.0)
    assert len(dog.suspects(140.0)) == 1


@pytest.mark.parametrize("phase", Phase)
def test_a_hang_is_found_in_whatever_phase(phase):
    dog = watchdog((Phase.REDUCE, 5), (Phase.REDUCE, 5))
    limit = 80.0 if phase.patient else 8.0
    for age, found in ((0.0, []), (limit, []), (limit + 0.5, [1])):
        dog.observe(0, mark(Phase.REDUCE, 5, age), 10.0 + age)
        dog.observe(1, mark(phase, 4, age), 10.0 + age)
        assert [suspect.rank for suspect in dog.suspects(10.0 + age)] == found


def test_a_phase_that_nobody_knows_is_an_error_where_it_is_marked():
    with pytest.raises(ValueError, match="'compile' is not a valid Phase"):
        Member.on_mark(SimpleNamespace(_generation=1), "compile", 5)


def test_who_answers_and_never_begins_is_found():
    """Its peers wait for it in the rendezvous, and would for ever."""
    dog = watchdog((Phase.REDUCE, 5), (Phase.REDUCE, 5))
    dog.begin([0, 1], 100.0)
    for age, found in ((0.1, []), (79.0, []), (80.5, [1])):
        dog.observe(0, mark(Phase.JOIN, -1, age), 100.0 + age)
        dog.observe(1, None, 100.0 + age)
        assert [suspect.rank for suspect in dog.suspects(100.0 + age)] == found


def test_what_comes_after_a_step_is_not_behind_it():
    dog = watchdog((Phase.AGREE, 5), (Phase.VALIDATE, 5), (Phase.SAVE, 5))
    for rank, phase in enumerate((Phase.AGREE, Phase.VALIDATE, Phase.SAVE)):
        dog.observe(rank, mark(phase, 5, 8.5), 18.5)
    assert [suspect.rank for suspect in dog.suspects(18.5)] == [0]


def test_slow_ranks_are_named():
    dog = Watchdog(hang_s=8.0)
    dog.begin(range(4), 0.0)
    for rank, busy in enumerate((1.0, 1.1, 0.9, 1.7)):
        dog.observe(rank, mark(Phase.COMPUTE, 3, busy_s=busy), 1.0)
    assert dog.slow() == {3: pytest.approx(1.7)}


def test_a_pause_of_the_driver_is_no_silence_of_the_members():
    clock, watchdog = Attention(), Watchdog(hang_s=8.0)
    watchdog.begin([0, 1], clock.look(1000.0))
    assert watchdog.suspects(clock.look(1060.0)) == [], "the driver slept for a minute; answers come through after it"
    watchdog.observe(0, None, clock.look(1060.1))
    for tenth in range(2, 82):
        found = watchdog.suspects(clock.look(1060.0 + tenth / 10))
    assert [suspect.rank for suspect in found] == [1], "who is silent while the driver listens is found"
