"""Variants against a base, on losses whose truth is known."""

import math
import random
from dataclasses import replace

import pytest
from scipy.stats import t

from jobs.study.question import Study
from jobs.study.questions.ablation import Ablation
from tests.jobs.study.synthetic import came_to, run
from workers.common.errors import ConfigError

AXES = {"variant": {"base": {}, "good": {"optim.ns_steps": 6}, "nothing": {"optim.ns_form": "gram"}}}
OF_VARIANT = {"base": 0.0, "good": -0.05, "nothing": 0.0, "bad": 0.1}


def study(axes=None, seeds=(0, 1, 2, 3), **question) -> Study:
    return Study(name="s", axes=axes or AXES, seeds=seeds, question=Ablation(**question))


def noisy(trial, noise: float = 0.002, key: str = "") -> float:
    """Return a loss: a seed moves all variants alike, and by far more than they differ."""
    common = random.Random(f"{key}{trial.seed}").gauss(2, 0.5)
    own = random.Random(f"{key}{trial.name}").gauss(0, noise)
    return common + OF_VARIANT.get(trial.coordinates["variant"], 0.0) + own


def test_every_point_is_trained_with_every_seed_and_a_seed_is_finished_before_the_next():
    trials = Ablation().trials(study(), {})
    assert [trial.seed for trial in trials] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [trial.name for trial in trials[:3]] == [
        "seed=0,variant=base",
        "seed=0,variant=good",
        "seed=0,variant=nothing",
    ]
    assert [trial.settings for trial in trials[:3]] == list(AXES["variant"].values())


def test_several_axes_are_multiplied_and_their_first_points_are_the_base():
    both = study({"optim.ns_steps": [5, 6, 7], "decay": {"on": {}, "off": {"optim.weight_decay": 0.0}}}, seeds=(0,))
    trials = Ablation().trials(both, {})
    assert len(trials) == 6 and trials[0].settings == {"optim.ns_steps": 5}
    assert trials[-1].settings == {"optim.ns_steps": 7, "optim.weight_decay": 0.0}
    assert trials[-1].coordinates == {"optim.ns_steps": "7", "decay": "off", "seed": 0}


def test_what_the_seeds_do_is_not_in_a_difference_and_what_a_variant_does_is_found():
    answer = Ablation().answer(study(), run(study(), noisy))
    good, nothing = (answer.facts["variants"][name] for name in ("good", "nothing"))
    assert good["outside_the_noise"] and good["difference"]["low"] < -0.05 < good["difference"]["high"] < -0.03
    assert not nothing["outside_the_noise"]
    assert answer.headline.startswith("Loss against base, nats per token, 4 seeds: good -0.0")
    assert answer.headline.endswith("; 1 within the noise")
    assert {key: one.value for key, one in answer.settings.items()} == {"optim.ns_steps": 6}
    assert "good: -0.0" in answer.settings["optim.ns_steps"].why


def test_an_interval_is_students_over_the_paired_differences_for_all_variants_together():
    losses = {"base": [1.0, 2.0, 3.0], "good": [1.1, 2.0, 3.2], "nothing": [1.0, 2.0, 3.0]}
    three = study(seeds=(0, 1, 2))
    done = run(three, lambda trial: losses[trial.coordinates["variant"]][trial.seed])
    found = Ablation().answer(three, done).facts["variants"]["good"]
    half = t.ppf(1 - 0.05 / 2 / 2, 2) * 0.1 / math.sqrt(3)  # Of 0.1, 0, 0.2: mean 0.1, standard deviation 0.1.
    assert found["differences"] == pytest.approx([0.1, 0.0, 0.2])
    assert found["difference"]["value"] == pytest.approx(0.1)
    assert found["difference"]["low"] == pytest.approx(0.1 - half)
    assert found["difference"]["high"] == pytest.approx(0.1 + half)


def test_of_many_variants_that_do_nothing_hardly_a_study_finds_one():
    """Each of ten at 95 % would find something in 40 of 100 studies."""
    axes = {"variant": {f"v{number}": {} for number in range(11)}}
    found = 0
    for number in range(100):
        one = study(axes, seeds=(0, 1, 2, 3))
        done = run(one, lambda trial, key=str(number): noisy(trial, key=key))
        found += not Ablation().answer(one, done).headline.startswith("Within the noise: 10 variants")
    assert found <= 12  # 5 expected; more than 12 has a chance of 0.2 %.


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_few_seeds_have_no_interval_and_nothing_is_found_however_large(seeds):
    few = study(seeds=seeds)
    answer = Ablation().answer(few, run(few, lambda trial: noisy(trial) + 5 * (trial.coordinates["variant"] == "good")))
    assert answer.headline == "No interval with fewer than 3 seeds: no difference to base can be told from noise"
    assert not answer.settings and "no interval" in str(answer.tables[0].rows)
    assert any("fewer than 3 seeds" in note for note in answer.notes)


def test_failed_trials_are_told_and_pairs_are_of_what_both_have():
    lost = {("good", 1), ("base", 2)}
    done = run(study(), lambda trial: None if (trial.coordinates["variant"], trial.seed) in lost else noisy(trial))
    answer = Ablation().answer(study(), done)
    good = answer.facts["variants"]["good"]
    assert good["seeds"] == [0, 3] and good["failed"] == [1] and good["difference"]["low"] != good["difference"]["low"]
    assert answer.facts["variants"]["nothing"]["seeds"] == [0, 1, 3]
    told = "Within the noise: nothing against base, validation loss, 3 seeds; 1 with fewer than 3 seeds cannot be told"
    assert answer.headline == f"{told}; 2 trial(s) failed"
    assert [row[-1] for row in answer.tables[0].rows] == ["-", "too few seeds", "within the noise"]
    assert any("good failed with seed(s) 1: the loss is not finite" in note for note in answer.notes)
    assert any("base failed with seed(s) 2" in note for note in answer.notes)
    assert not answer.settings, "what failed once is no winner"


def test_variants_with_more_tokens_are_told_to_have_them():
    done = run(study(), noisy)
    more = {name: replace(one, tokens=2 * one.tokens) if "good" in name else one for name, one in done.items()}
    (note,) = [note for note in Ablation().answer(study(), more).notes if "tokens" in note]
    assert note == "Another number of tokens than base: good. That is in the difference, too."
    assert not any("tokens" in note for note in Ablation().answer(study(), done).notes)


def test_a_study_that_has_only_begun_is_answered_as_far_as_it_is():
    assert Ablation().answer(study(), {}).headline.startswith("Nothing to compare yet")
    first = Ablation().trials(study(), {})[0]
    assert Ablation().answer(study(), {first.name: came_to(first, 2.0)}).headline.startswith("Nothing to compare yet")


def test_differences_along_the_run_have_the_steps_of_both():
    answer = Ablation().answer(study(), run(study(), noisy))
    (along,) = [plot for plot in answer.plots if plot.name == "differences"]
    assert [curve.label for curve in along.curves] == ["good", "nothing"]
    assert list(along.curves[0].x) == [1, 21, 41, 61, 81] and along.curves[0].y[-1] == pytest.approx(-0.05, abs=0.01)
    (losses,) = [plot for plot in answer.plots if plot.name == "losses"]
    assert losses.curves[0].x[-1] == 100 and len(losses.curves) == 3


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "name two points or more"),
        ({"optim.lr": [0.1]}, "name two points or more"),
        ({"seed": [1, 2]}, r"axes.seed: seeds are no axis"),
        ({"variant": {"a": {}, "b": 3}}, r"axes.variant.b: must be settings"),
        ({"optim.lr": 0.1}, r"axes.optim.lr: must be a list of values"),
    ],
)
def test_what_cannot_be_compared_is_refused(axes, message):
    with pytest.raises(ConfigError, match=message):
        Ablation().check(Study(name="s", axes=axes, question=Ablation()))
