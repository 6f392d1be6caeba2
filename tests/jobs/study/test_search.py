"""Searches, on losses whose least is known."""

import math
import random
import sys

import pytest

from jobs.study.question import Study
from jobs.study.questions.search import Search
from jobs.study.ranges import read_ranges
from tests.jobs.study.synthetic import came_to, run
from workers.common.errors import ConfigError

RANGES = {"optim.lr": {"low": 1e-4, "high": 1.0, "log": True}, "optim.weight_decay": {"low": 0.0, "high": 0.4}}
BEST = {"optim.lr": 2e-2, "optim.weight_decay": 0.1}


def study(seeds=(0,), axes=None, **question) -> Study:
    return Study(name="s", axes=axes or {}, seeds=seeds, question=Search(**{"ranges": RANGES, **question}))


def bowl(trial) -> float:
    """Return a loss that is least at BEST: 0.3 more at ten times the rate, 0.04 at 0.2 more of decay."""
    lr, decay = (trial.settings[key] for key in BEST)
    return 2 + 0.3 * math.log10(lr / BEST["optim.lr"]) ** 2 + (decay - BEST["optim.weight_decay"]) ** 2


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_least_of_a_bowl_is_found_with_few_trials(at_once):
    for seed in range(3):
        one = study(trials_each=40, at_once=at_once, sampler_seed=seed)
        found = one.question.answer(one, run(one, bowl)).settings
        assert abs(math.log2(found["optim.lr"].value / 2e-2)) < 1, "within a factor of two over four decades"
        assert found["optim.weight_decay"].value == pytest.approx(0.1, abs=0.15)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_outcomes_give_the_same_suggestions_whoever_finished_first(sampler):
    one = study(trials_each=15, at_once=4, sampler=sampler)
    done = run(one, bowl)
    assert run(one, bowl, finished_last=lambda name: name[::-1]).keys() == done.keys()
    names = [trial.name for trial in one.question.trials(one, done)]
    shuffled = dict(sorted(done.items(), key=lambda item: hash(item[0])))
    assert [trial.name for trial in one.question.trials(one, shuffled)] == names and len(names) == 15


def test_at_every_moment_what_was_asked_for_stays_asked_for():
    """A study that is killed after any trial goes on with the same ones."""
    one = study(trials_each=12, at_once=3, seeds=(0, 1, 2))
    done = run(one, bowl)
    names = [trial.name for trial in one.question.trials(one, done)]
    for number in range(len(names)):
        known = [trial.name for trial in one.question.trials(one, {name: done[name] for name in names[:number]})]
        assert known == names[: len(known)] and number < len(known)


def test_other_outcomes_give_other_suggestions():
    """Or the sampler would have been told nothing."""
    one = study(trials_each=30)
    assert run(one, bowl).keys() != run(one, lambda trial: -bowl(trial)).keys()
    assert run(one, bowl).keys() != run(study(trials_each=30, sampler_seed=1), bowl).keys()


def test_what_fails_is_never_the_best_and_keeps_nobody_from_it():
    one = study(trials_each=40, at_once=2)
    done = run(one, lambda trial: None if trial.settings["optim.lr"] > 0.03 else bowl(trial))
    (searched,) = one.question.searches(one, done)
    assert searched.failed == sum(outcome.status == "failed" for outcome in done.values()) > 0
    assert 1e-2 < searched.best[0]["optim.lr"] <= 0.03
    assert any(f"{searched.failed} of which came to no loss" in note for note in one.question.answer(one, done).notes)


def test_nothing_but_failures_is_said():
    one = study(trials_each=3)
    answer = one.question.answer(one, run(one, lambda trial: None))
    assert answer.headline == "No trial of all came to a loss" and not answer.settings


def test_the_best_is_repeated_with_seeds_that_the_search_has_not_seen_and_these_alone_decide():
    """Two optimizers that are alike in truth; one has had luck in its search."""
    axes = {"optimizer": {"adamw": {"optim.name": "adamw"}, "muon": {"optim.name": "muon"}}}
    rates = {"optim.lr": [1e-3, 2e-3, 4e-3]}
    one = study(seeds=(0, 1, 2, 3), axes=axes, ranges=rates, sampler="grid")

    def loss(trial) -> float:
        luck = -0.5 if trial.seed == 0 and trial.settings["optim.name"] == "muon" else 0
        return (
            2
            + luck
            + abs(math.log2(trial.settings["optim.lr"] / 2e-3))
            + random.Random(trial.name + "!").gauss(0, 0.01)
        )

    done = run(one, loss)
    assert len(done) == 2 * 3 + 2 * 3
    answer = one.question.answer(one, done)
    assert answer.headline == "Within the noise: adamw, muon, each at its best (3 seeds that no choice has seen)"
    assert not answer.settings, "noise does not tell which to use"
    assert [table.title for table in answer.tables][1:] == [
        "Published by others, not measured here: Muon against AdamW"
    ]
    better = run(one, lambda trial: loss(trial) - (0.4 if trial.settings["optim.name"] == "muon" else 0))
    answer = one.question.answer(one, better)
    assert answer.headline.startswith("Each at its best, loss against adamw, nats per token: muon -0.39")
    assert {key: found.value for key, found in answer.settings.items()} == {"optim.name": "muon", "optim.lr": 2e-3}
    assert (answer.settings["optim.lr"].low, answer.settings["optim.lr"].high) == (2e-3, 2e-3)


def test_settings_within_the_noise_of_the_best_are_an_interval():
    one = study(seeds=(0, 1, 2, 3), ranges={"optim.lr": [1e-3, 2e-3, 4e-3, 8e-3]}, sampler="grid")
    of_rate = {1e-3: 2.3, 2e-3: 2.001, 4e-3: 2.0, 8e-3: 2.2}
    done = run(one, lambda trial: of_rate[trial.settings["optim.lr"]] + 0.01 * trial.seed)
    found = one.question.answer(one, done).settings["optim.lr"]
    assert (found.value, found.low, found.high) == (4e-3, 2e-3, 4e-3)
    alone = study(ranges={"optim.lr": [1e-3, 2e-3]}, sampler="grid")
    found = alone.question.answer(alone, run(alone, lambda trial: 2 + trial.settings["optim.lr"])).settings["optim.lr"]
    assert found.low is None and found.high is None, "one seed tells of no noise"


def test_a_best_at_the_end_of_its_range_is_told_first():
    one = study(ranges={"optim.lr": [1e-3, 2e-3, 4e-3]}, sampler="grid", seeds=(0, 1, 2, 3))
    answer = one.question.answer(one, run(one, lambda trial: 2 - trial.settings["optim.lr"]))
    assert "at an end of its range, so the best may lie outside" in answer.headline
    inside = one.question.answer(one, run(one, lambda trial: abs(trial.settings["optim.lr"] - 2e-3)))
    assert "at an end" not in inside.headline


def test_points_of_an_axis_have_ranges_of_their_own():
    axes = {"optimizer": {"adamw": {"optim.name": "adamw"}, "muon": {"optim.name": "muon"}}}
    own = {"adamw": {"optim.lr": [1e-3, 3e-3]}, "muon": {"optim.lr": [1e-2, 3e-2]}}
    one = study(axes=axes, ranges={}, ranges_by_point=own, sampler="grid")
    assert [trial.settings for trial in one.question.trials(one, {})] == [
        {"optim.name": name, "optim.lr": rate} for name in own for rate in own[name]["optim.lr"]
    ]


def test_grids_of_every_kind_and_whole_numbers_and_names():
    ranges = {
        "b": {"low": 1e-3, "high": 1e-1, "log": True, "points": 3},
        "a": {"low": 0, "high": 10, "points": 3},
        "c": ["x", "y"],
    }
    one = study(ranges=ranges, sampler="grid")
    settings = [trial.settings for trial in one.question.trials(one, {})]
    assert len(settings) == 18 and settings[0] == {"a": 0, "b": 1e-3, "c": "x"}
    assert sorted({found["b"] for found in settings}) == [1e-3, 1e-2, 1e-1]
    assert sorted({found["a"] for found in settings}) == [0, 5, 10]
    sampled = study(ranges=ranges, trials_each=20)
    done = run(sampled, lambda trial: trial.settings["a"] + trial.settings["b"] + (trial.settings["c"] == "x"))
    assert all(isinstance(trial.settings["a"], int) for trial in sampled.question.trials(sampled, done))
    best = sampled.question.answer(sampled, done).settings
    assert best["c"].value == "y" and best["c"].low is None and best["a"].value <= 2


def test_a_suggestion_that_was_tried_is_not_trained_again():
    one = study(ranges={"n": {"low": 1, "high": 2}}, trials_each=10)
    assert len(run(one, lambda trial: float(trial.settings["n"]))) == 2


def test_a_value_is_what_its_name_shows():
    one = study(trials_each=6)
    for trial in one.question.trials(one, {}):
        shown = dict(part.split("=") for part in trial.name.split(","))
        assert all(float(shown[key]) == trial.settings[key] for key in BEST)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"ranges": {}}, "nothing to search for all"),
        ({"ranges": {"a": {"low": 1.0}}}, r"question.ranges.a.high: must be a finite number, not None"),
        ({"ranges": {"a": {"low": 2.0, "high": 1.0}}}, "low must be less than high, not 2 and 1"),
        ({"ranges": {"a": {"low": 0.0, "high": 1.0, "log": True}}}, "must be greater than 0 where log is true"),
        ({"ranges": {"a": {"low": 0.0, "high": 1.0, "lg": True}}}, r"question.ranges.a.lg: unknown key"),
        ({"ranges": {"a": {"low": 0.0, "high": math.inf}}}, "must be a finite number, not inf"),
        ({"ranges": {"a": 3}}, "must be a list of values or"),
        ({"sampler": "grid"}, "a grid needs points: N"),
        (
            {"ranges": {"optim.lr": {"low": 0.1, "high": 5.0}}},
            r"ranges.optim.lr: 5.0 cannot be tried: .*lr must be .* not 5",
        ),
        ({"ranges": {"optim.lrr": [0.1]}}, r"ranges.optim.lrr: 0.1 cannot be tried: .*did you mean optim.lr"),
        ({"trials_each": 0}, r"question.trials_each must be 1 or more, not 0"),
        ({"ranges_by_point": {"muon": {}}}, r"ranges_by_point.muon: no axis has a point of this name"),
    ],
)
def test_what_cannot_be_searched_is_refused(question, message):
    one = study(**question)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        one.question.check(one)


def test_without_optuna_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    one = study()
    with pytest.raises(ConfigError, match=r"install raymuon\[studies\]"):
        one.question.check(one)
    grid = study(ranges={"optim.lr": [0.1, 0.2]}, sampler="grid")
    grid.question.check(grid)
    assert len(grid.question.trials(grid, {})) == 2


def test_unfinished_searches_are_said_to_be():
    one = study(trials_each=4, at_once=2, seeds=(0, 1, 2, 3))
    first = one.question.trials(one, {})
    assert one.question.answer(one, {}).headline == "Not finished: the search of all goes on"
    half = {trial.name: came_to(trial, 2.0) for trial in first}
    assert one.question.answer(one, half).headline == "Not finished: the search of all goes on"
    assert not one.question.answer(one, half).settings


def test_ranges_are_read_in_one_order():
    assert [one.key for one in read_ranges({"b": [1], "a": [2]}, "")] == ["a", "b"]
