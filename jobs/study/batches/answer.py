"""The answer of a batch-size study: the token ratio first, then all that it stands on."""

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from statistics import geometric_mean
from typing import Any

from jobs.study.batches.devices import pareto_curves
from jobs.study.batches.found import Branches, Level, found_in, per_doubling
from jobs.study.batches.levels import Run, noise_scales
from jobs.study.batches.plan import Plan
from jobs.study.batches.plots import plots_of
from jobs.study.batches.tables import tables_of
from jobs.study.fits.batch import Place
from jobs.study.fits.estimate import Estimate
from jobs.study.numbers import outside, text_of
from jobs.study.question import Answer, Setting
from workers.common.errors import ConfigError


def answer_of(plan: Plan) -> Answer:
    """Return what the outcomes come to, as far as they are."""
    runs, levels, branches = found_in(plan)
    places, problem = _places(plan, runs, levels)
    notes = _notes(plan, levels, branches) + ([problem] if problem else [])
    return Answer(
        headline=headline(plan, levels),
        facts=_facts(runs, levels, branches, places),
        tables=tables_of(plan, runs, levels, branches, places),
        plots=plots_of(plan, runs, levels, places),
        notes=notes,
        settings=_settings(plan, runs, levels, branches),
    )


def _places(plan: Plan, runs: Sequence[Run], levels: Sequence[Level]) -> tuple[dict[str, list[Place]], str]:
    if not plan.question.devices or not levels:
        return {}, ""
    try:
        return pareto_curves(plan, runs, levels[-1]), ""
    except ConfigError as error:
        return {}, f"No times on several devices: {error}"


def headline(plan: Plan, levels: Sequence[Level]) -> str:
    """Say first what the ratio is at the smallest and the largest batch, or that it lies within the noise."""
    if not levels:
        return "No ratio yet: no run has come to a loss"
    told = [_finding(plan, levels[-1], name) for name in levels[-1].ratios]
    return "; ".join(told)


def _finding(plan: Plan, level: Level, optimizer: str) -> str:
    ratios, baseline = level.ratios[optimizer], plan.question.baseline
    if not ratios:
        return f"No ratio at {level.loss:.4g} nats: no batch at which both {baseline} and {optimizer} come to it"
    (small, first), (large, last) = (min(ratios.items()), max(ratios.items()))
    what = f"R_L(B), the tokens of {baseline} over those of {optimizer} at {level.loss:.4g} nats"
    told = f"{text_of(first)} at {small:,.0f} tokens per step and {text_of(last)} at {large:,.0f}"
    if small == large:
        told = f"{text_of(first)} at {small:,.0f} tokens per step"
    tested = [one for one in ratios.values() if one.known]
    if not tested:
        return f"{what}: {told}; nothing tells the noise"
    if not any(outside(one, 1.0) for one in tested):
        return f"Within the noise at every batch: {what}: {told}"
    return f"{what}: {told}{_trend(level.trends[optimizer])}"


def _trend(slope: Estimate | None) -> str:
    if slope is None or not slope.known:
        return ""
    if not outside(slope):
        return "; that it changes with the batch is within the noise"
    return f"; it {'rises' if slope.value > 0 else 'falls'} by {text_of(per_doubling(slope))} per doubling of the batch"


def _facts(
    runs: Sequence[Run], levels: Sequence[Level], branches: dict[str, Branches], places: dict[str, list[Place]]
) -> dict[str, Any]:
    return {
        "levels": [
            {
                "loss": level.loss,
                "optimizers": {
                    name: {
                        "tokens": {f"{batch:g}": of for batch, of in one.tokens.items()},
                        "token_optimal_batch": one.optimal,
                        "critical_batch": one.critical
                        and {**asdict(one.critical.critical), "slope": one.critical.slope},
                        "refused": one.refusal,
                    }
                    for name, one in level.of.items()
                },
                "ratios": {
                    name: {f"{batch:g}": asdict(ratio) for batch, ratio in of.items()}
                    for name, of in level.ratios.items()
                },
                "trends": {name: slope and asdict(slope) for name, slope in level.trends.items()},
            }
            for level in levels
        ],
        "branches": {
            name: {
                "losses": {
                    f"{at:g}": {f"{batch:g}": loss for batch, loss in of.items()} for at, of in one.losses.items()
                },
                "critical_batch": {f"{at:g}": batch for at, batch in one.critical.items()},
                "schedule": [asdict(growth) for growth in one.schedule],
            }
            for name, one in branches.items()
        },
        "noise_scale_heuristic": {
            name: {f"{batch:g}": scales for (one, batch), scales in noise_scales(runs).items() if one == name}
            for name in dict.fromkeys(run.optimizer for run in runs)
        },
        "pareto_simulated": {name: [asdict(place) for place in of] for name, of in places.items()},
    }


def _notes(plan: Plan, levels: Sequence[Level], branches: dict[str, Branches]) -> list[str]:
    question = plan.question
    tried = {name: sum(len(one.tried[name]) for one in plan.tuned.values()) for name in plan.optimizers}
    rule = f"times (batch / {question.rate_batch or plan.sequences(plan.smallest)})^{question.rate_exponent:g}"
    effort = ", ".join(f"{name} {count}" for name, count in tried.items())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in question.rates.items())
    factors = ", ".join(f"{factor:g}" for factor in question.factors)
    notes = [
        f"Learning rates: {rates}, {rule}, and factors {factors} of that; trials: {effort}.",
        _curves_note(plan),
        "Intervals (95 %) of ratios: Welch's, with how far seeds lie apart pooled over an optimizer's batches; of the "
        "critical batch: the profile of the two-piece model.",
    ]
    if len(plan.study.seeds) < 2:
        notes.append("With one seed no ratio has an interval.")
    for batch, tuned in plan.tuned.items():
        if ends := [name for (name, _), border in tuned.border.items() if border and tuned.finished]:
            notes.append(
                f"Batch {batch}: the best rate is at an end of the grid for {', '.join(ends)}: it may be better."
            )
        if lost := [name for name in plan.optimizers if tuned.finished and plan.best(name, batch) is None]:
            notes.append(f"Batch {batch}: no trial of {', '.join(lost)} came to a loss.")
    for name, one in levels[-1].of.items() if levels else []:
        if one.refusal:
            notes.append(f"{name}: no critical batch at {levels[-1].loss:.4g} nats: {one.refusal}.")
    if branches:
        notes.append(
            f"Branches: {question.branch_tokens:g} tokens each, rate times the root of the factor; the critical batch "
            f"is the largest whose loss is at most {question.epsilon:g} nats above the best of the smaller ones "
            "(arXiv 2505.23971), as are all below it."
        )
    return notes


def _curves_note(plan: Plan) -> str:
    if plan.question.losses == "validation":
        return "T_L(B): tokens at the first validation at or below L, on the line from the one before (over ln tokens)."
    return (
        f"T_L(B): tokens at the first training loss at or below L, smoothed (what is left after a thousandth of "
        f"the tokens: {plan.question.smoothing:g}), alike in tokens at each batch."
    )


def _settings(
    plan: Plan, runs: Sequence[Run], levels: Sequence[Level], branches: dict[str, Branches]
) -> dict[str, Setting]:
    """Return the token-optimal batch and its rate, of the optimizer that needs the fewest tokens to the lowest loss."""
    known = {
        name: geometric_mean(one.tokens[one.optimal])
        for name, one in (levels[-1].of.items() if levels else [])
        if one.optimal is not None
    }
    if not known:
        return {}
    winner = min(known, key=known.__getitem__)
    found, at = levels[-1].of[winner], f"{winner}, {levels[-1].loss:.4g} nats"
    run = next(run for run in runs if run.optimizer == winner and run.tokens_per_step == found.optimal)
    sequences, rate = plan.sequences(run.batch), plan.best(winner, run.batch)
    unit = run.tokens_per_step / sequences
    why = f"{at}: the largest batch within {plan.question.tolerance:.0%} of the fewest tokens"
    ends: dict[str, float] = {}
    if found.critical:
        critical = found.critical.critical.through(lambda tokens: tokens / unit)
        why += f"; the two-piece model's B* is {text_of(critical)}"
        if sequences in critical and isfinite(critical.high):
            ends = {"low": critical.low, "high": critical.high}
    settings = {key: Setting(value=value, why=at) for key, value in plan.optimizers[winner].items()}
    settings["train.global_batch"] = Setting(value=sequences, why=why, **ends)
    settings["optim.lr"] = Setting(value=rate, why=f"{at}: the best at this batch")
    return settings | _stages(plan, winner, branches.get(winner))


def _stages(plan: Plan, winner: str, branches: Branches | None) -> dict[str, Setting]:
    """Return the batch schedule as `train.stages`, where the batch grows."""
    rate = plan.best(winner, plan.smallest)
    if branches is None or rate is None or len(branches.schedule) < 2:
        return {}
    ends = [*(growth.tokens for growth in branches.schedule[1:]), plan.question.tokens]
    stages = [
        {
            "name": f"batch-{growth.batch}",
            "tokens": end - growth.tokens,
            "global_batch": growth.batch,
            "schedule": "constant",
            "lr": float(f"{rate * growth.rate_factor:.6g}"),
        }
        for growth, end in zip(branches.schedule, ends, strict=True)
        if end > growth.tokens
    ]
    why = f"{winner}: the batch doubles where branches say that the critical one is above twice it"
    return {
        "train.stages": Setting(value=stages, why=why),
        "train.steps": Setting(value=0, why="the stages have theirs"),
    }
