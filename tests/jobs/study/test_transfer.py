"""The question `transfer`, on a trainer whose best learning rate is known: found, with names and levels that stay."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

from jobs.study.file import load_study
from jobs.study.question import Answer, Outcome, Study, Trial
from jobs.study.questions.transfer import Transfer
from jobs.study.telescope import Axis, telescope
from workers.common.errors import ConfigError

RATES = [0.0025 * 2**i for i in range(8)]
WIDTHS = {str(n): {"model.hidden_size": n, "model.num_heads": n // 16} for n in (32, 64, 128, 256)}
DRIFT = {"none": lambda n: 0.08 * 32 / n, "spectral": lambda n: 0.03 * math.exp(-8 / n)}
"""The best learning rate at each width: under `spectral` it is that of equation 4, with alpha = 8."""


def study_of(**changes) -> Study:
    axes = {"width": WIDTHS, "optim.width_rule": ["none", "spectral"], "optim.lr": RATES}
    return replace(Study(name="t", axes=axes, question=Transfer()), **changes)


def trainer(noise: float = 0.0, limit: float = math.inf) -> Callable[[Trial], Outcome]:
    """Return what trains a trial: a parabola in the logarithm; nothing is learned at rates of `limit` and above."""

    def train(trial: Trial) -> Outcome:
        size, rate = trial.settings["model.hidden_size"], trial.settings["optim.lr"]
        best = DRIFT[trial.settings["optim.width_rule"]](size)
        loss = 2 + 0.04 * math.log(rate / best) ** 2 + 0.1 * (32 / size) ** 0.3
        if "optim.weight_decay" in trial.settings:
            loss += 0.02 * math.log(trial.settings["optim.weight_decay"] / 0.1) ** 2
        loss += random.Random(trial.name).gauss(0, noise)
        failed = rate >= limit
        return Outcome(
            trial=trial.name,
            run_id=trial.name,
            status="failed" if failed else "finished",
            val_loss=None if failed else loss,
            flops=float(size**2),
            seconds=size / 32,
            coordinates=trial.coordinates,
        )

    return train


def run(study: Study, train: Callable[[Trial], Outcome]) -> tuple[dict[str, Outcome], Answer, int]:
    """Train one trial after the other until no more is asked for, in any order, asking after each."""
    done: dict[str, Outcome] = {}
    before: list[str] = []
    shuffle, rounds = random.Random(0), 0
    study.question.check(study)
    while True:
        trials = study.question.trials(study, done)
        names = [trial.name for trial in trials]
        assert len(names) == len(set(names)) and set(before) <= set(names), "what was asked for stays asked for"
        if rounds % 7 == 0:
            study.question.answer(study, done)  # At any time.
        missing = [trial for trial in trials if trial.name not in done]
        if not missing:
            return done, study.question.answer(study, done), rounds
        for chosen in shuffle.sample(missing, min(3, len(missing))):
            done[chosen.name], before, rounds = train(chosen), names, rounds + 1


def test_the_optimum_is_found_within_the_last_spacing_and_the_movement_is_that_of_the_rule():
    done, answer, rounds = run(study_of(), trainer())
    assert rounds == len(done), "each trial once"
    rules = answer.facts["rules"]
    for rule, found in rules.items():
        assert found["complete"] and [level["width"] for level in found["levels"]] == ["32", "64", "128", "256"]
        truth = DRIFT[rule](256) / DRIFT[rule](32)
        assert found["moved"]["optim.lr"]["value"] == pytest.approx(truth, rel=0.02)
    last = rules["spectral"]["levels"][-1]
    assert abs(math.log2(last["best"]["optim.lr"] / DRIFT["spectral"](256))) <= 1 / 8, "the last spacing is 2^(1/8)"
    assert last["points"] == 3 and rules["spectral"]["full_grids"][0]["points"] == 8
    assert not any(level["border"] for level in rules["spectral"]["levels"])
    fit = rules["spectral"]["drift"]["optim.lr"]
    assert fit["alpha"]["value"] == pytest.approx(8, rel=0.05) and fit["limit"]["value"] == pytest.approx(
        0.03, rel=0.02
    )
    assert answer.headline.startswith("From width 32 to 256 the best learning rate moves by a factor of 1.2")
    assert "8" in answer.headline.split("under none")[0].rsplit(", ", 1)[-1]
    assert answer.settings["optim.width_rule"].value == "spectral" and answer.settings["optim.base_width"].value == 32
    assert answer.settings["optim.lr"].value == pytest.approx(DRIFT["spectral"](256), rel=0.02)


def test_what_the_sweep_outruns_is_extended_once_and_told():
    """Without a rule the optimum halves with each doubling: the sweep's smaller grids cannot follow."""
    _, answer, _ = run(study_of(), trainer())
    levels = answer.facts["rules"]["none"]["levels"]
    assert [level["extended"] for level in levels] == [False, True, True, True]
    assert levels[-1]["border"] and any(
        note.startswith("none, width 256: the optimum lies at") for note in answer.notes
    )
    axis = Axis.of("optim.lr", RATES)
    best = levels[-1]["best"]["optim.lr"]
    assert best > 1.5 * DRIFT["none"](256) and abs(axis.place(best) * 8 - round(axis.place(best) * 8)) < 1e-4


def test_a_first_grid_with_its_best_value_at_an_end_is_widened():
    axes = {**study_of().axes, "optim.lr": [0.03, 0.06, 0.12], "optim.width_rule": ["spectral"]}
    done, answer, _ = run(study_of(axes=axes), trainer())
    first = answer.facts["rules"]["spectral"]["levels"][0]
    assert first["extended"] and first["points"] == 4 and not first["border"]
    assert "optim.lr=0.015,optim.width_rule=spectral,seed=0,width=32" in done
    for level in answer.facts["rules"]["spectral"]["levels"]:
        assert level["best"]["optim.lr"] == pytest.approx(0.03, rel=0.6)


def test_noise_is_in_the_interval_and_seeds_narrow_it():
    def interval(noise: float, seeds: tuple[int, ...]) -> tuple[float, float, float]:
        moved = run(study_of(seeds=seeds), trainer(noise))[1].facts["rules"]["spectral"]["moved"]["optim.lr"]
        return moved["low"], moved["value"], moved["high"]

    truth = DRIFT["spectral"](256) / DRIFT["spectral"](32)
    low, value, high = interval(0.003, (0, 1, 2))
    assert low < truth < high and low < value < high and high / low < 4
    worse = interval(0.02, (0, 1, 2))
    assert worse[0] < low and worse[2] > high


def test_rates_that_fail_count_as_infinitely_bad():
    done, answer, _ = run(study_of(), trainer(limit=0.15))
    assert any(one.status == "failed" for one in done.values())
    assert "trial(s) failed" in " ".join(answer.notes)
    best = answer.facts["rules"]["spectral"]["best"]["optim.lr"]["32"]
    assert best["value"] == pytest.approx(DRIFT["spectral"](32), rel=0.1)
    nothing = run(study_of(), trainer(limit=0.0))[1]
    assert nothing.headline.startswith("Not known yet") and not nothing.settings


def test_two_keys_are_tuned_at_once_with_the_papers_numbers_of_points():
    axes = {
        "width": WIDTHS,
        "optim.width_rule": ["spectral"],
        "optim.lr": RATES,
        "optim.weight_decay": [0.005 * 10 ** (i / 4) for i in range(8)],
    }
    study = study_of(axes=axes, question=Transfer(least_points=1))
    done, answer, _ = run(study, trainer())
    levels = answer.facts["rules"]["spectral"]["levels"]
    assert [level["points"] for level in levels] == [64, 25, 9, 1], "8 x 8, 5 x 5, 3 x 3, 1 x 1 (arXiv 2505.02222)"
    assert levels[-1]["best"]["optim.lr"] == pytest.approx(DRIFT["spectral"](256), rel=0.1)
    assert levels[-1]["best"]["optim.weight_decay"] == pytest.approx(0.1, rel=0.1)
    telescoped, full = next(table for table in answer.tables if "costs" in table.title).rows
    assert telescoped[2] == 99 and full[2] == 64
    flops = sum((32 * 2**i) ** 2 * points for i, points in enumerate((64, 25, 9, 1)))
    assert telescoped[3] * 1e12 == pytest.approx(flops) and full[3] * 1e12 == 64 * 256**2
    assert len(done) == 64 + 25 + 9 + 1 + 64


@pytest.mark.parametrize("place", ["settings", "base"])
def test_points_beyond_what_a_config_takes_are_left_out(place, tmp_path):
    axes = {**study_of().axes, "optim.lr": [0.25, 0.5, 1.0], "optim.width_rule": ["none"]}
    base = tmp_path / "base.yaml"
    base.write_text("model: {name: llama}\noptim: {weight_decay: 0.2}\n")
    changed = {"settings": {"optim.weight_decay": 0.2}} if place == "settings" else {"base": str(base)}
    done, *_ = run(study_of(axes=axes, **changed), trainer())
    assert max(one.coordinates["optim.lr"] for one in done.values()) == 0.5


@pytest.mark.parametrize(
    ("axes", "question", "text"),
    [
        ({"optim.lr": None}, {}, "axes.optim.lr is missing"),
        ({"optim.lr": [0.01, 0.02, 0.03]}, {}, r"axes.optim.lr must be values that grow by one ratio"),
        ({"optim.lr": [0.01, 0.02]}, {}, "axes.optim.lr must be three positive values or more"),
        ({"optim.lr": {"a": {"optim.lr": 1}}}, {}, "axes.optim.lr must be three positive values"),
        (
            {"width": {"a": {"model.hidden_size": 32}, "b": {"model.hidden_size": 48}}},
            {},
            r"twice the .* not \[32, 48\]",
        ),
        ({"width": {"a": {}, "b": {}}}, {}, r"not \[None, None\]"),
        ({}, {"least_points": 2}, "question.least_points must be odd"),
        ({}, {"full_grids": ("512",)}, r"question.full_grids: 512 is no point of axes.width \(32, 64, 128, 256\)"),
        ({}, {"full_grid_rules": ("muP",)}, "question.full_grid_rules: muP is no point"),
    ],
)
def test_a_study_that_cannot_answer_is_refused(axes, question, text):
    changed = {key: value for key, value in {**study_of().axes, **axes}.items() if value is not None}
    study = study_of(axes=changed, question=Transfer(**question))
    with pytest.raises(ConfigError, match=text):
        study.question.check(study)


def test_the_settings_are_those_of_the_lowest_loss_where_several_rules_hold():
    """Under `rms` the rate moves least and the loss is higher; under `none` it moves by a factor of 8."""
    best = {"none": lambda n: 0.08 * 32 / n, "rms": lambda n: 0.03, "spectral": lambda n: 0.03 * math.exp(-8 / n)}

    def train(trial: Trial) -> Outcome:
        rule, size = trial.settings["optim.width_rule"], trial.settings["model.hidden_size"]
        loss = 2 + 0.04 * math.log(trial.settings["optim.lr"] / best[rule](size)) ** 2 + 0.1 * (rule == "rms")
        return Outcome(
            trial=trial.name, run_id=trial.name, status="finished", val_loss=loss, coordinates=trial.coordinates
        )

    _, answer, _ = run(study_of(axes={**study_of().axes, "optim.width_rule": [*best]}), train)
    rule = answer.settings["optim.width_rule"]
    assert rule.value == "spectral" and "lowest loss" in rule.why
    _, answer, _ = run(study_of(axes={**study_of().axes, "optim.width_rule": ["none"]}), train)
    rule = answer.settings["optim.width_rule"]
    assert rule.value == "none" and "moves least" in rule.why


def test_a_base_width_among_the_settings_is_refused():
    study = study_of(settings={"optim.base_width": 64})
    with pytest.raises(ConfigError, match="settings.optim.base_width is the smallest width"):
        study.question.check(study)


def test_places_are_exact_and_on_the_lattice_of_their_level():
    axis = Axis.of("x", [1.0, 2.0, 4.0, 8.0])
    levels = telescope([axis], ["a", "b", "c"], lambda width, at: (axis.value(at[0]) - 3) ** 2, 3, lambda at: True)
    assert [level.spacing for level in levels] == [1, Fraction(1, 2), Fraction(1, 4)]
    for level in levels:
        assert all((place / level.spacing).denominator == 1 for (place,) in level.asked)
    assert axis.value(levels[-1].best[0]) == pytest.approx(3, rel=2**0.25 - 1)


def test_the_shipped_study_asks_for_what_its_configs_take():
    found = load_study("transfer")
    study = found.study
    study.question.check(study)
    trials = study.question.trials(study, {})
    assert len(trials) == 2 * 4 * (6 + 6), "the smallest width's grid, and the largest's, with two seeds"
    for trial in (trials[0], trials[-1]):
        config = found.config(trial, {})
        assert config.model.hidden_size == int(trial.coordinates["width"])
        assert config.optim.base_width == 32 and config.optim.width_rule == trial.coordinates["optim.width_rule"]
        assert config.optim.lr == trial.coordinates["optim.lr"]
