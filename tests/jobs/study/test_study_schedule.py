"""What begins next, how far a study is, and which trial is hopeless: pure functions."""

import math

import pytest

from jobs.study.progress import Part, account, told
from jobs.study.question import Branch, Trial
from jobs.study.record import Cost
from jobs.study.schedule import branch_steps, next_trial, orphan
from jobs.study.trial import TrialWatcher, diverged
from tests.jobs.study.synthetic import came_to
from workers.reports import StepDone


def trial(name: str, parent: str = "", step: int = 0) -> Trial:
    return Trial(name=name, settings={}, coordinates={}, branch=Branch(trial=parent, step=step) if parent else None)


TRIALS = [trial("b5", "a", 5), trial("b7", "a", 7), trial("a"), trial("c")]


def begins(done: list[str], taken: list[str], steps: set[int]) -> str | None:
    outcomes = {name: came_to(trial(name), 1.0) for name in done}
    found = next_trial(TRIALS, outcomes, taken, lambda name, step: name in done or (name == "a" and step in steps))
    return found and found.name


def test_the_first_that_can_begins_and_a_branch_when_its_step_is_there():
    assert begins([], [], set()) == "a"
    assert begins([], ["a"], set()) == "c"
    assert begins([], ["a"], {7}) == "b7"
    assert begins([], ["a", "b7"], {5, 7}) == "b5"
    assert begins(["a"], [], set()) == "b5"
    assert begins([], ["a", "c"], {6}) is None
    assert begins(["a", "c", "b5", "b7"], [], set()) is None


def test_a_branch_of_what_has_failed_can_never_begin():
    assert orphan(TRIALS, {"a": came_to(trial("a"), 1.0)}) is None
    found = orphan(TRIALS, {"a": came_to(trial("a"), None)})
    assert found is not None and found[0].name == "b5" and "the loss is not finite" in found[1]
    assert branch_steps(TRIALS, "a") == {5: ["b5"], 7: ["b7"]} and branch_steps(TRIALS, "c") == {}


COST = Cost(first_step=11, last_step=20, workers=2, flops=100.0)


def part(state: str, step: int) -> Part:
    return Part(state=state, cost=COST, step=step)  # type: ignore


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (10, 0.0), (11, 0.1), (20, 1.0), (25, 1.0)])
def test_the_share_of_a_branch_is_of_its_own_steps(step, share):
    assert part("running", step).share == pytest.approx(share)


def test_what_is_left_is_told_by_what_the_done_have_taken():
    parts = [part("finished", 20), part("failed", 15), part("running", 15), part("waiting", 0), part("open", 12)]
    now = account(parts, [(100.0, 40.0)], slots=2)
    assert (now.finished, now.failed, now.running, now.left, now.total) == (1, 1, 1, 2, 5)
    assert now.flops == pytest.approx(100 + 50 + 50 + 0 + 20)
    assert now.expected_flops == pytest.approx(220 + 50 + 100 + 80), "nobody trains what is left of a failed one"
    assert now.slot_hours == pytest.approx(220 * 0.4 / 3600)
    assert now.eta_s == pytest.approx(230 * 0.4 / (2 * 2)), "two trials of two workers at a time"
    assert "1 of 5 trials done, 1 failed, 1 running, 2 left" in told(now)


def test_nothing_is_told_of_time_before_any_was_measured():
    now = account([part("waiting", 0)], [], slots=3)
    assert now.eta_s is None and now.slot_hours is None and "left" in told(now)
    assert account([], [], slots=1).total == 0


def falling(steps: int, start: float = 5.0, by: float = 0.01) -> list[tuple[int, float]]:
    return [(step, start - by * step) for step in range(1, steps + 1)]


def test_a_trial_that_learns_is_left_alone():
    assert not diverged([], 5.0, 100)
    for steps in range(1, 101):
        assert not diverged(falling(steps), 5.0, 100)


def test_a_trial_that_has_hardly_begun_to_learn_is_left_alone():
    warming_up = [(step, 5.537 + 0.016 * (step % 2)) for step in range(1, 41)]
    assert not any(diverged(warming_up[:step], 5.537, 40) for step in range(1, 41))


def test_a_loss_above_the_start_ends_a_trial_after_a_quarter_of_its_steps_and_not_before():
    rising = falling(100, by=-0.1)
    assert not diverged(rising[:24], 5.0, 100)
    assert "after step 25 of 100 the loss is 7.3, and it began at 5" in diverged(rising[:25], 5.0, 100)
    spike = [*falling(29), (30, 6.0)]
    assert not diverged(spike, 5.0, 100), "one high loss is noise: five are averaged"
    assert diverged([*falling(25), *((step, 6.0) for step in range(26, 31))], 5.0, 100)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_a_trial_at_once(loss):
    assert "step 2 is" in diverged([(1, 5.0), (2, loss)], 5.0, 100)


def test_the_shortest_trial_is_judged_by_what_it_has():
    assert not diverged([(1, 5.0)], 5.0, 1)
    assert diverged([(1, 5.6)], 5.0, 4)


def test_a_branch_goes_by_the_beginning_of_all():
    branch = [(step, 1.0 + 0.002 * step) for step in range(501, 600)]
    assert not diverged(branch, 5.5, 600)
    assert diverged(branch, 1.9, 600)


def step_of(number: int, loss: float) -> StepDone:
    known = dict.fromkeys(StepDone.__dataclass_fields__, 0)
    return StepDone(**{**known, "step": number, "loss": loss, "seconds": 0.5})


def test_a_watcher_asks_a_hopeless_trial_to_stop_once_and_one_that_may_not_be_stopped_never():
    hopeless = TrialWatcher("t", lambda text: None, 20, True)
    patient = TrialWatcher("t", lambda text: None, 20, False)
    for number in range(1, 12):
        hopeless.report(step_of(number, 5.0 + number))
        patient.report(step_of(number, 5.0 + number))
    assert hopeless.hopeless.startswith("diverged: after step 5 of 20") and hopeless.stop.requests == 1
    assert not patient.hopeless and patient.stop.requests == 0
    assert (patient.steps, patient.seconds, patient.start) == (11, 5.5, 6.0)
    redone = TrialWatcher("t", lambda text: None, 20, True, losses=falling(15), start=4.99)
    redone.report(step_of(11, 4.0))
    assert len(redone.losses) == 15, "a step that is trained again is counted once"
