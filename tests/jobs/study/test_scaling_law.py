"""The question scaling-law on outcomes by a formula: trials, effort, resumption, and the answer that is known."""

from collections import Counter
from dataclasses import replace
from functools import partial
from math import inf, log

import pytest

from jobs.study.question import Study
from jobs.study.questions.scaling_law import ScalingLaw
from optim.checks import ConfigProblems
from tests.jobs.study.trainer import BEST, LAWS, run, train
from workers.common.errors import ConfigError

SIZES = {
    f"{width}x{layers}": {"model.hidden_size": width, "model.num_layers": layers, "model.intermediate_size": 2 * width}
    for width, layers in ((32, 1), (32, 2), (64, 2), (96, 3))
}
RATES = {"adamw": 4e-3, "muon": 1.6e-2}


CENTRED = [4e-3 * 2**0.25 * factor for factor in (0.5, 1, 2)]


def study_of(seeds=(0, 1, 2), sizes=SIZES, settings=None, **question) -> Study:
    known = {"tokens_per_parameter": (20.0,), "rates": RATES, **question}
    if "tokens" in known or "flops" in known:
        del known["tokens_per_parameter"]
    return Study(
        name="law",
        base="demo-llama",
        settings={"train.global_batch": 4, "train.micro_batch": 4, "train.seq_len": 64, **(settings or {})},
        axes={"size": sizes, "optimizer": {"adamw": {"optim.name": "adamw"}, "muon": {"optim.name": "muon"}}},
        seeds=seeds,
        question=ScalingLaw(**known),
    )


def counted(trials, *keys: str) -> Counter:
    return Counter(tuple(trial.coordinates[key] for key in keys) for trial in trials)


def truth(loss: float) -> float:
    (a, b), (c, d) = LAWS["adamw"], LAWS["muon"]
    return (a / loss) ** (1 / b) / (c / loss) ** (1 / d)


def test_trials_are_the_same_number_for_each_optimizer_and_the_best_has_all_seeds():
    study = study_of()
    study.question.check(study)
    done, trials = run(study, partial(train, study))
    # 4e-3 and 1.6e-2 are nearest to the best: no grid grows. Three rates, and two more seeds of the best.
    assert counted(trials, "size", "optimizer") == {(size, name): 5 for size in SIZES for name in BEST}
    best = [trial for trial in trials if trial.seed > 0]
    assert {(t.coordinates["optimizer"], t.settings["optim.lr"]) for t in best} == {("adamw", 4e-3), ("muon", 1.6e-2)}
    trial = next(t for t in trials if t.name == "lr=0.016,optimizer=muon,seed=0,size=64x2")
    assert trial.settings["optim.name"] == "muon" and trial.settings["model.hidden_size"] == 64
    parameters = done[trial.name].parameters
    assert trial.settings["train.steps"] == round(20 * parameters / 256) and parameters > 10_000
    assert trial.settings["optim.warmup_steps"] == round(0.05 * trial.settings["train.steps"])


def test_what_was_done_decides_and_not_when():
    study = study_of(sizes=dict(list(SIZES.items())[:2]))
    done, trials = run(study, partial(train, study))
    again = study.question.trials(study, {name: done[name] for name in reversed(done)})
    assert [*again] == trials


def test_the_ratio_is_the_known_one():
    study = study_of()
    done, _ = run(study, partial(train, study))
    answer = study.question.answer(study, done)
    ratios = next(one for one in answer.facts["ratios"] if one["cost"] == "FLOPs of the model")
    shift = {name: 1 + 0.02 * log(RATES[name] / BEST[name]) ** 2 for name in BEST}
    for one in ratios["measured"] + ratios["projected"]:
        (a, b), (c, d) = LAWS["adamw"], LAWS["muon"]
        exact = (a * shift["adamw"] / one["loss"]) ** (1 / b) / (c * shift["muon"] / one["loss"]) ** (1 / d)
        assert one["value"] == pytest.approx(exact, rel=1e-3)
    assert answer.headline.startswith("muon needs") and "times fewer FLOPs than adamw" in answer.headline
    laws = {(one["optimizer"], one["cost"]): one for one in answer.facts["laws"]}
    assert laws["muon", "FLOPs of the model"]["exponent"]["value"] == pytest.approx(0.065, abs=1e-4)
    wall = next(one for one in answer.facts["ratios"] if one["cost"] == "seconds in steps")
    assert wall["measured"][-1]["value"] == pytest.approx(ratios["measured"][-1]["value"] / 1.1, rel=1e-3)
    assert answer.settings["optim.lr"].value == 1.6e-2 and answer.settings["optim.name"].value == "muon"
    assert any(curve.context for plot in answer.plots for curve in plot.curves)


def test_noise_has_intervals_and_no_difference_is_within_it():
    study = study_of()
    done, _ = run(study, partial(train, study, noise=0.002))
    answer = study.question.answer(study, done)
    found = next(one for one in answer.facts["ratios"] if one["cost"] == "FLOPs of the model")["measured"]
    assert all(one["low"] < truth(one["loss"]) < one["high"] for one in found[1:-1])
    lr = answer.settings["optim.lr"]
    assert lr.low is not None and lr.high is not None and lr.low < BEST["muon"] < lr.high

    def alike(trial):  # Muon's trials come to what AdamW's would.
        twin = replace(trial, settings={**trial.settings, "optim.name": "adamw"})
        twin.settings["optim.lr"] *= 1 if trial.settings["optim.name"] == "adamw" else BEST["adamw"] / BEST["muon"]
        return replace(train(study, twin, 0.002), trial=trial.name)

    done, _ = run(study, alike)
    assert study.question.answer(study, done).headline.startswith("Within the noise")


def test_a_best_at_the_border_gives_each_optimizer_one_more():
    study = study_of(rates={"adamw": 4e-3, "muon": 2e-3}, sizes=dict(list(SIZES.items())[:2]), seeds=(0,), extend=2)
    done, trials = run(study, partial(train, study))
    assert set(counted(trials, "size", "optimizer").values()) == {5}
    muon = sorted(t.settings["optim.lr"] for t in trials if t.coordinates["optimizer"] == "muon")
    assert {*muon} == {1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2}
    adamw = sorted({t.settings["optim.lr"] for t in trials if t.coordinates["optimizer"] == "adamw"})
    assert adamw[0] == 2e-3 and adamw[-1] == 8e-3 and len(adamw) == 5  # Between its best and its neighbours.
    notes = "\n".join(study.question.answer(study, done).notes)
    assert "the grid grew 2 time(s), for all optimizers alike" in notes and "at an end of the grid still" in notes


def test_the_next_size_is_tuned_around_the_best_of_the_one_before():
    study = study_of(rates={"adamw": 4e-3, "muon": 4e-3}, centre="previous", seeds=(0,))
    first = study.question.trials(study, {})
    assert {trial.coordinates["size"] for trial in first} == {"32x1"}
    _, trials = run(study, partial(train, study))
    second = [t.settings["optim.lr"] for t in trials if t.coordinates["size"] == "32x2"]
    # Muon's best was beyond its grid, at 1.6e-2; AdamW got one more between 4e-3 and 8e-3, which is nearer to 5e-3.
    assert sorted(second) == [pytest.approx(one, abs=1e-6) for one in sorted((0.8e-2, 1.6e-2, 3.2e-2, *CENTRED))]


def test_reuse_takes_the_rate_as_it_is():
    study = study_of(reuse="adamw", rates={"adamw": 4e-3})
    study.question.check(study)
    done, trials = run(study, partial(train, study))
    assert counted(trials, "size", "optimizer") == {
        (size, name): count for size in SIZES for name, count in (("adamw", 5), ("muon", 3))
    }
    assert {t.settings["optim.lr"] for t in trials if t.coordinates["optimizer"] == "muon"} == {4e-3}
    assert any("not tuned" in note for note in study.question.answer(study, done).notes)


def test_weight_decay_is_tuned_with_each_rate():
    study = study_of(weight_decays=(0.0, 0.1), sizes=dict(list(SIZES.items())[:2]), seeds=(0, 1))

    def outcome(trial):
        found = train(study, trial)
        return replace(found, val_loss=found.val_loss * (1 if trial.settings["optim.weight_decay"] else 1.01))

    done, trials = run(study, outcome)
    assert set(counted(trials, "size", "optimizer").values()) == {7}
    assert study.question.answer(study, done).settings["optim.weight_decay"].value == 0.1


def test_several_budgets_out_of_one_run():
    settings = {"optim.schedule": "wsd", "optim.final_lr_fraction": 0.0}
    study = study_of(tokens_per_parameter=(5.0, 10.0, 40.0), branched=True, settings=settings)
    study.question.check(study)
    done, trials = run(study, partial(train, study))
    named = {trial.name: trial for trial in trials}
    branches = [trial for trial in trials if trial.branch]
    assert len(branches) == 2 / 3 * len(trials)
    for trial in branches:
        trunk = named[trial.branch.trial]
        assert trunk.coordinates["budget"] == 40 and trunk.seed == trial.seed and trunk.branch is None
        same = ("optim.lr", "optim.name", "optim.warmup_steps", "model.hidden_size")
        assert all(trunk.settings[key] == trial.settings[key] for key in same)
        # The last step at the peak: of the trunk's schedule and of its own.
        assert trial.branch.step == int(0.8 * trial.settings["train.steps"]) > trial.settings["optim.warmup_steps"]
    answer = study.question.answer(study, done)
    seconds = {one["tokens"]: one["seconds"] for one in answer.facts["points"] if one["size"] == "64x2"}
    rates = [seconds[tokens] / tokens for tokens in seconds]
    assert max(rates) == pytest.approx(min(rates), rel=0.11)  # Of the whole way, as of the trunk (Muon's are 1.1).
    assert answer.facts["surfaces"] or any("parameters and tokens" in note for note in answer.notes)


def test_budgets_in_flops_compare_the_best_size_of_each():
    study = study_of(flops=(2e9, 8e9, 3.2e10), sizes=dict(list(SIZES.items())[:3]), seeds=(0,))
    done, trials = run(study, partial(train, study))
    costs = {round(done[trial.name].flops / trial.coordinates["budget"], 1) for trial in trials}
    assert costs == {1.0}
    laws = study.question.answer(study, done).facts["laws"]
    assert next(one for one in laws if one["optimizer"] == "muon")["exponent"]["value"] == pytest.approx(0.065, rel=0.1)


def test_failed_trials_are_left_out_and_told():
    study = study_of(seeds=(0, 1))

    def outcome(trial):
        found = train(study, trial)
        rate = trial.settings["optim.lr"]
        if trial.settings["optim.name"] == "adamw" and (rate > 5e-3 or trial.coordinates["size"] == "32x1"):
            return replace(found, status="failed", error="the loss is not finite", val_loss=None)
        return found

    done, trials = run(study, outcome)
    answer = study.question.answer(study, done)
    assert len(answer.facts["points"]) == 7  # AdamW has none at the smallest size.
    assert not any(one["value"] == inf for one in answer.facts["ratios"][0]["measured"])
    assert counted(trials, "size", "optimizer")["32x1", "adamw"] == 5  # Two rounds down, and no seeds of nothing.


def test_an_answer_of_nothing_and_of_one_size():
    study = study_of()
    assert study.question.answer(study, {}).headline.startswith("No ratio yet: 0 of 4 sizes")
    done, _ = run(study, partial(train, study))
    one = {name: outcome for name, outcome in done.items() if "32x1" in name}
    answer = study.question.answer(study, one)
    assert answer.headline.startswith("No ratio yet: 1 of 4 sizes") and any(
        "2 points, not 1" in n for n in answer.notes
    )


@pytest.mark.parametrize(
    "question, reason",
    [
        ({"tokens_per_parameter": ()}, "give budgets by one of them, not by 0"),
        ({"tokens_per_parameter": (20.0,), "factors": (0.5, 1.0)}, "1 (no tuning) or 3 and more"),
        ({"tokens_per_parameter": (20.0,), "factors": (1.0, 0.5, 2.0)}, "rise"),
        ({"tokens_per_parameter": (20.0,), "branched": True}, "several budgets"),
        ({"tokens_per_parameter": (-1.0,)}, "above 0"),
    ],
)
def test_questions_that_check_themselves(question, reason):
    with pytest.raises(ConfigProblems) as caught:
        ScalingLaw(**question)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "study, reason",
    [
        (study_of(rates={"adamw": 1e-3}), "question.rates: needs a learning rate above 0 for muon"),
        (study_of(baseline="sgd"), "question.baseline: must be one of adamw, muon"),
        (study_of(reuse="sgd"), "question.reuse"),
        (study_of(sizes=dict(list(SIZES.items())[:1])), "two sizes or more"),
        (study_of(tokens=(2000.0,)), "is 8 steps of 256 tokens, and 10 are needed"),
        (study_of(tokens=(1e5, 1e6), branched=True), "branched needs optim.schedule=wsd"),
        (
            study_of(
                tokens=(1e5, 1e6),
                branched=True,
                warmup=0.5,
                settings={"optim.schedule": "wsd", "optim.decay_fraction": 0.6},
            ),
            "decay begins within the warm-up",
        ),
        (replace(study_of(), axes={"optim.lr": [1e-3]}), "axes: a scaling law has `size` and `optimizer`"),
        (study_of(settings={"train.steps": 0, "train.stages": [{"name": "a", "steps": 5}]}), "train.stages"),
    ],
)
def test_studies_that_cannot_be_answered(study, reason):
    with pytest.raises(ConfigError) as caught:
        study.question.check(study)
    assert reason in str(caught.value)
