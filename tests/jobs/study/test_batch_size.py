"""The question batch-size on outcomes by a formula: trials, levels, and the answers that are known."""

from collections import Counter
from dataclasses import replace
from functools import partial
from math import exp, inf, sqrt

import pytest

from jobs.study.batches.devices import step_seconds
from jobs.study.batches.levels import levels_of
from jobs.study.configs import config_of
from jobs.study.question import Outcome, Study, Trial
from jobs.study.questions.batch_size import BatchSize
from optim.checks import ConfigProblems
from tests.jobs.study.trainer import noise_of, run
from workers.common.errors import ConfigError

BATCHES = [4, 8, 16, 32, 64, 128]
SEQ, RECORDS = 64, 40
CRITICAL, SLOPE = {"adamw": 12 * SEQ, "muon": 40 * SEQ}, {"adamw": -0.3, "muon": -0.5}
SLOWER = 1.4
"""Tokens that AdamW needs at small batches, over Muon's."""


def study_of(seeds=(0, 1), batches=None, settings=None, **question) -> Study:
    known = {"tokens": 2.0**20, "rates": {"adamw": 1e-3, "muon": 1e-2}, **question}
    return Study(
        name="batches",
        settings={"train.micro_batch": 4, "train.seq_len": SEQ, "optim.schedule": "constant", **(settings or {})},
        axes={
            "train.global_batch": batches or BATCHES,
            "optimizer": {"adamw": {"optim.name": "adamw"}, "muon": {"optim.name": "muon"}},
        },
        seeds=seeds,
        question=BatchSize(**known),
    )


def slowness(optimizer: str, batch: float) -> float:
    """Return by how much more tokens a batch needs, and AdamW."""
    beyond = max(1.0, batch / CRITICAL[optimizer]) ** (SLOPE[optimizer] + 1)
    return beyond * (SLOWER if optimizer == "adamw" else 1.0)


def train(study: Study, trial: Trial, noise: float = 0.0) -> Outcome:
    """Return a run with the loss 30 (1e4 + tokens / slowness)^-0.2: T_L(B) is the slowness times what L asks for."""
    config = config_of(study, trial.settings)
    optimizer, steps = config.optim.name, config.train.steps
    if trial.branch:
        batch = config.recipe.stages[-1].global_batch
        # The branches' critical batch is twice the trunk's at 2^18 tokens and four times it later.
        allowed = {2.0**18: 8, 2.0**19: 16}[trial.coordinates["branch_at"]]
        return outcome_of(trial, steps, 1.0, [], 3.0 + (0.005 if batch <= allowed else 0.05) * (batch > 4))
    per_step = config.train.global_batch * SEQ
    slow = slowness(optimizer, per_step) * exp(noise * noise_of(trial))

    def loss(step: float) -> float:
        return 30 * (1e4 + step * per_step / slow) ** -0.2

    every = max(1, steps // RECORDS)
    losses = [(step, loss(step)) for step in range(every, steps + 1, every)]
    return outcome_of(trial, steps, per_step, losses, loss(steps))


def outcome_of(trial: Trial, steps: int, per_step: float, losses, at_end: float) -> Outcome:
    return Outcome(
        trial=trial.name,
        run_id="run",
        status="finished",
        coordinates=trial.coordinates,
        steps=steps,
        tokens=int(steps * per_step),
        val_loss=at_end,
        losses=losses,
        validation=losses,
        seconds=10.0,
        noise_scale=None if per_step == BATCHES[0] * SEQ else 100.0 + trial.seed,
    )


def test_trials():
    study = study_of()
    study.question.check(study)
    done, trials = run(study, partial(train, study))
    assert Counter((t.coordinates["batch"], t.coordinates["optimizer"]) for t in trials) == {
        (str(batch), name): 2 for batch in BATCHES for name in CRITICAL
    }
    for trial in trials:
        batch = trial.settings["train.global_batch"]
        assert trial.settings["train.steps"] * batch * SEQ == 2**20
        base = study.question.rates[trial.settings["optim.name"]]
        assert trial.settings["optim.lr"] == pytest.approx(base * sqrt(batch / 4), rel=1e-5)
        assert trial.settings["train.validate_every"] == max(1, trial.settings["train.steps"] // 40)
    assert [*study.question.trials(study, dict(reversed(done.items())))] == trials


def test_rates_that_are_tuned_and_scaled_otherwise():
    study = study_of(factors=(0.5, 1.0, 2.0), rate_exponent=0.0, rate_batch=16, seeds=(0, 1))

    def outcome(trial):
        found = train(study, trial)
        return replace(found, val_loss=2.0 + abs(trial.settings["optim.lr"] - 2e-3))

    done, trials = run(study, outcome)
    assert len(trials) == len(BATCHES) * 2 * (3 + 1)
    best = {t.coordinates["optimizer"]: t.settings["optim.lr"] for t in trials if t.seed == 1}
    assert best == {"adamw": 2e-3, "muon": 5e-3}
    notes = "\n".join(study.question.answer(study, done).notes)
    assert "Batch 4: the best rate is at an end of the grid for adamw, muon" in notes


@pytest.mark.parametrize("losses", ["validation", "training"])
def test_ratio_and_critical_batch_are_the_known_ones(losses: str):
    study = study_of(losses=losses, smoothing=0.0)
    done, _ = run(study, partial(train, study))
    answer = study.question.answer(study, done)
    assert len(answer.facts["levels"]) == 4
    for level in answer.facts["levels"]:
        for batch, ratio in level["ratios"]["muon"].items():
            exact = slowness("adamw", float(batch)) / slowness("muon", float(batch))
            assert ratio["value"] == pytest.approx(exact, rel=0.02)
    last = answer.facts["levels"][-1]["optimizers"]
    for name, known in last.items():
        assert known["critical_batch"]["value"] == pytest.approx(CRITICAL[name], rel=0.1)
        assert known["critical_batch"]["slope"] == pytest.approx(SLOPE[name], abs=0.05)
    assert (last["adamw"]["token_optimal_batch"], last["muon"]["token_optimal_batch"]) == (8 * SEQ, 32 * SEQ)
    assert answer.settings["train.global_batch"].value == 32 and answer.settings["optim.name"].value == "muon"
    assert answer.settings["optim.lr"].value == pytest.approx(1e-2 * sqrt(8), rel=1e-5)


def test_noise_has_intervals_that_hold_and_a_trend():
    study = study_of(seeds=(0, 1, 2))
    done, _ = run(study, partial(train, study, noise=0.02))
    answer = study.question.answer(study, done)
    ratios = answer.facts["levels"][-1]["ratios"]["muon"]
    inside = [
        one["low"] <= slowness("adamw", float(batch)) / slowness("muon", float(batch)) <= one["high"]
        for batch, one in ratios.items()
    ]
    assert sum(inside) >= 5
    assert answer.headline.startswith("R_L(B)") and "rises by" in answer.headline
    known = answer.facts["levels"][-1]["optimizers"]["muon"]["critical_batch"]
    assert known["low"] < CRITICAL["muon"] < known["high"]


def test_the_noise_scale_stands_beside_where_it_is_logged():
    study = study_of(seeds=(0, 1))
    done, _ = run(study, partial(train, study))
    answer = study.question.answer(study, done)
    known = {f"{batch * SEQ:g}": [100.0, 101.0] for batch in BATCHES[1:]}
    assert answer.facts["noise_scale_heuristic"] == {"adamw": known, "muon": known}
    rows = next(table for table in answer.tables if "noise scale" in table.title).rows
    assert rows[0] == ["adamw", BATCHES[1] * SEQ, 100.5, 2] and len(rows) == 2 * len(known)


def test_no_difference_is_within_the_noise():
    study = study_of(seeds=(0, 1))

    def alike(trial):
        twin = replace(trial, settings={**trial.settings, "optim.name": "muon"})
        return train(study, twin, 0.05)

    done, _ = run(study, alike)
    assert study.question.answer(study, done).headline.startswith("Within the noise at every batch")
    study = study_of(seeds=(0,))
    done, _ = run(study, partial(train, study))
    assert "nothing tells the noise" in study.question.answer(study, done).headline


def test_batches_that_never_come_to_a_target():
    study = study_of(targets=(3.0, 2.2, 0.1))
    done, _ = run(study, partial(train, study))
    answer = study.question.answer(study, done)
    assert answer.headline.startswith("No ratio at 0.1 nats")
    far = answer.facts["levels"][1]["optimizers"]["adamw"]["tokens"]
    assert far[f"{4 * SEQ}"] and not far[f"{128 * SEQ}"]


def test_branches_have_the_trunk_as_their_first_stage():
    study = study_of(branch_at=(2.0**18, 2.0**19), branch_tokens=2.0**16, seeds=(0,))
    study.question.check(study)
    done, trials = run(study, partial(train, study))
    branches = [trial for trial in trials if trial.branch]
    assert len(branches) == 2 * 4 * 2
    assert sum("checkpoint.at" in trial.settings for trial in trials) == 2
    named = {trial.name: trial for trial in trials}
    for trial in branches:
        trunk, config = named[trial.branch.trial], config_of(study, trial.settings)
        factor = trial.coordinates["factor"]
        assert trial.branch.step in trunk.settings["checkpoint.at"]  # The branch begins when the trunk has ended.
        assert trial.branch.step == trial.coordinates["branch_at"] / (4 * SEQ) == config.train.lengths[0]
        assert config.train.batches == (4, 4 * factor) and trunk.settings["train.global_batch"] == 4
        theirs = config_of(study, trunk.settings).recipe
        for step in (1, trial.branch.step):  # As the trunk it is what it goes on from.
            assert config.recipe.samples_before(step) == theirs.samples_before(step)
        after = trial.branch.step + 1
        assert config.recipe.learning_rate(after) == pytest.approx(theirs.learning_rate(after) * sqrt(factor), rel=1e-5)
        assert config.train.lengths[1] * factor * 4 * SEQ == 2**16
    answer = study.question.answer(study, done)
    found = answer.facts["branches"]["muon"]
    assert found["critical_batch"] == {f"{2.0**18:g}": 8, f"{2.0**19:g}": 16}
    stages = answer.settings["train.stages"].value
    assert [(one["global_batch"], one["tokens"]) for one in stages] == [(4, 2.0**19), (8, 2.0**19)]
    assert [one["lr"] for one in stages] == pytest.approx([1e-2, 1e-2 * sqrt(2)], rel=1e-5)
    values = {key: setting.value for key, setting in answer.settings.items()}
    config = config_of(study, {**values, "train.tokens": 0})  # A run takes them.
    assert config.train.batches == (4, 8) and config.train.steps == 2**19 // 256 + 2**19 // 512


def test_a_branch_that_failed_is_beyond_the_critical_batch():
    study = study_of(branch_at=(2.0**18,), branch_tokens=2.0**16, seeds=(0,))

    def outcome(trial):
        found = train(study, trial)
        if trial.branch and trial.coordinates["factor"] >= 2:
            return replace(found, status="failed", val_loss=None)
        return found

    done, _ = run(study, outcome)
    answer = study.question.answer(study, done)
    assert answer.facts["branches"]["muon"]["critical_batch"] == {f"{2.0**18:g}": 4}
    assert "train.stages" not in answer.settings
    none = {name: replace(one, val_loss=None) if "branch_at" in name else one for name, one in done.items()}
    answer = study.question.answer(study, none)  # Nothing is told by branches that all failed.
    assert not answer.facts["branches"] and "train.stages" not in answer.settings


def test_simulated_times():
    study = study_of(devices=(1, 4), batches=[8, 32], seeds=(0,))
    done, _ = run(study, partial(train, study))
    answer = study.question.answer(study, done)
    places = answer.facts["pareto_simulated"]["muon"]
    assert [one["devices"] for one in places] == sorted({one["devices"] for one in places})
    hours = [one["seconds"] for one in places]
    assert hours == sorted(hours, reverse=True)
    config = config_of(study, {"train.global_batch": 32})
    steps = answer.facts["levels"][-1]["optimizers"]["muon"]["tokens"][f"{32 * SEQ}"][0] / (32 * SEQ)
    at_32 = [one["seconds"] for one in places if one["batch"] == 32 * SEQ and one["devices"] == 1]
    assert all(one == pytest.approx(steps * step_seconds(config, 1, "H100")) for one in at_32)
    unknown = study_of(devices=(1,), batches=[8, 32], gpu_type="abacus", seeds=(0,))
    told = unknown.question.answer(unknown, done)
    assert not told.facts["pareto_simulated"] and any("abacus" in note for note in told.notes)


def test_levels_lie_between_losses_that_all_come_to():
    assert levels_of([], 4) == []
    study = study_of(seeds=(0,))
    done, _ = run(study, partial(train, study))
    losses = [one["loss"] for one in study.question.answer(study, done).facts["levels"]]
    worst = max(outcome.val_loss for outcome in done.values())
    assert losses == sorted(losses, reverse=True) and losses[-1] == pytest.approx(worst, rel=0.01)


def test_an_answer_of_nothing_and_of_what_failed():
    study = study_of(branch_at=(2.0**18,), branch_tokens=2.0**16)
    assert study.question.answer(study, {}).headline.startswith("No ratio yet")

    def failing(trial):
        found = train(study, trial)
        return replace(found, status="failed", val_loss=None) if trial.coordinates["optimizer"] == "adamw" else found

    done, trials = run(study, failing)
    answer = study.question.answer(study, done)
    assert answer.headline.startswith("No ratio at") and "no trial of adamw came to a loss" in "\n".join(answer.notes)
    assert not any(t.branch for t in trials if t.coordinates["optimizer"] == "adamw")  # There is no trunk.


@pytest.mark.parametrize(
    "question, reason",
    [
        ({"tokens": 0.0}, "tokens must be greater than 0"),
        ({"factors": (1.0, 2.0)}, "1 (no tuning) or 3 and more"),
        ({"branch_at": (100.0,)}, "branch_tokens must be above 0"),
        ({"branch_at": (2e6,), "branch_tokens": 1.0}, "branch_at must lie between"),
        ({"branch_factors": (2, 4)}, "begin with 1"),
        ({"smoothing": inf}, "finite"),
    ],
)
def test_questions_that_check_themselves(question, reason):
    with pytest.raises(ConfigProblems) as caught:
        BatchSize(**{"tokens": 1e6, **question})
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "study, reason",
    [
        (study_of(rates={"muon": 1e-3}), "needs a learning rate above 0 for adamw"),
        (study_of(seeds=(0, 0)), "seeds: must be one or more, each once"),
        (study_of(batches=[4]), "two batches or more"),
        (study_of(batches=[4, 4]), "each of another size"),
        (study_of(batches=["many", 4]), "a whole number of sequences"),
        (study_of(tokens=20_000.0), "are 2 steps of 8,192 tokens, and 10 are needed"),
        (study_of(settings={"optim.schedule": "cosine"}, branch_at=(2.0**18,), branch_tokens=1e5), "schedule=constant"),
        (study_of(branch_at=(2.0**18,), branch_tokens=300.0), "branch_tokens=300 are 0 steps"),
        (replace(study_of(), axes={"optimizer": {}}), "axes: must be `optimizer`"),
    ],
)
def test_studies_that_cannot_be_answered(study, reason):
    with pytest.raises(ConfigError) as caught:
        study.question.check(study)
    assert reason in str(caught.value)
