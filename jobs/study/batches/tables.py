"""The tables of a batch-size study."""

from collections.abc import Sequence
from statistics import fmean

from jobs.study.batches.found import Branches, Level
from jobs.study.batches.levels import Run, noise_scales
from jobs.study.batches.plan import WHOLE, Plan
from jobs.study.fits.batch import Place
from jobs.study.numbers import text_of
from jobs.study.question import Table


def tables_of(
    plan: Plan,
    runs: Sequence[Run],
    levels: Sequence[Level],
    branches: dict[str, Branches],
    places: dict[str, list[Place]],
) -> list[Table]:
    """Return all tables that have a row."""
    critical = [_critical(levels), _noise(runs)]
    tables = [_tokens(plan, levels), *critical, _branches(branches), _schedule(branches), _pareto(places)]
    return [table for table in (*tables, _runs(runs), _tuning(plan)) if table.rows]


def _tokens(plan: Plan, levels: Sequence[Level]) -> Table:
    others = [name for name in plan.optimizers if name != plan.question.baseline]
    rows = []
    for level in levels:
        batches = sorted({batch for one in level.of.values() for batch in one.tokens})
        for batch in batches:
            tokens = [level.of[name].means.get(batch) for name in plan.optimizers]
            ratios = [text_of(level.ratios[name].get(batch)) for name in others]
            rows.append([f"{level.loss:.4g}", int(batch), *tokens, *ratios])
    return Table(
        title="Tokens until a loss, T_L(B), and their ratio, R_L(B)",
        columns=[
            *("loss, nats per token", "batch, tokens"),
            *(f"tokens, {name}" for name in plan.optimizers),
            *(f"{plan.question.baseline} over {name}" for name in others),
        ],
        rows=rows,
        note="Geometric means over the seeds; with 95 % intervals. Above 1 the other needs fewer tokens.",
    )


def _critical(levels: Sequence[Level]) -> Table:
    rows = []
    for level in levels:
        for name, one in level.of.items():
            fit = one.critical
            told = [text_of(fit.critical), f"{fit.slope:.3g}"] if fit else [f"none: {one.refusal}", None]
            rows.append([f"{level.loss:.4g}", name, None if one.optimal is None else int(one.optimal), *told])
    return Table(
        title="Token-optimal and critical batch, in tokens",
        columns=["loss, nats per token", "optimizer", "token-optimal", "critical, B*", "m beyond it"],
        rows=rows,
        note="Two pieces: ln S = -ln B + b1 up to B*, m ln B + b2 beyond (arXiv 2505.02222, appendix F).",
    )


def _noise(runs: Sequence[Run]) -> Table:
    rows = [[name, int(batch), fmean(scales), len(scales)] for (name, batch), scales in noise_scales(runs).items()]
    return Table(
        title="Heuristic: the gradient's noise scale at the end, in tokens",
        columns=["optimizer", "batch, tokens", "noise scale, mean", "seeds"],
        rows=rows,
        note="tr(Sigma) / |G|^2 (arXiv 1812.06162), of runs whose steps have several micro-batches. It is no "
        "measurement of the critical batch, from which it was found to lie far off (arXiv 2505.23971).",
    )


def _branches(branches: dict[str, Branches]) -> Table:
    rows = [
        [name, at, int(batch), f"{loss:.4f}", "critical" if batch == one.critical.get(at) else ""]
        for name, one in branches.items()
        for at, losses in sorted(one.losses.items())
        for batch, loss in sorted(losses.items())
    ]
    columns = ["optimizer", "branched off after tokens", "batch, sequences", "loss at the end", ""]
    return Table(title="Branches with more and more batch", columns=columns, rows=rows)


def _schedule(branches: dict[str, Branches]) -> Table:
    rows = [
        [name, growth.tokens, growth.batch, f"{growth.rate_factor:.3g}"]
        for name, one in branches.items()
        for growth in one.schedule
    ]
    columns = ["optimizer", "from tokens", "batch, sequences", "rate, times the smallest batch's"]
    return Table(title="Batch schedule that follows from the branches", columns=columns, rows=rows)


def _pareto(places: dict[str, list[Place]]) -> Table:
    rows = [
        [name, place.devices, int(place.batch), place.seconds / 3600] for name, of in places.items() for place in of
    ]
    return Table(
        title="Simulated: time until the lowest loss by devices",
        columns=["optimizer", "devices", "batch, tokens", "hours"],
        rows=rows,
        note="Steps as measured, times the seconds of a step as `raymuon plan` estimates them. What others beat in "
        "both is left out.",
    )


def _runs(runs: Sequence[Run]) -> Table:
    rows = [
        [
            *(run.optimizer, run.batch, run.outcome.coordinates["seed"], f"{run.outcome.coordinates['lr']:g}"),
            *(run.outcome.steps, run.outcome.tokens, f"{run.outcome.val_loss:.4f}", run.outcome.seconds),
        ]
        for run in runs
    ]
    columns = ["optimizer", "batch", "seed", "rate", "steps", "tokens", "loss at the end", "seconds in steps"]
    return Table(title="Runs at the best learning rate", columns=columns, rows=rows)


def _tuning(plan: Plan) -> Table:
    rows = []
    for batch, tuned in plan.tuned.items():
        for optimizer, choices in tuned.tried.items():
            for rate in sorted(rate for rate, _ in choices):
                outcome = plan.outcome(optimizer, batch, rate, plan.first_seed)
                if outcome is not None:
                    mark = "best" if (rate, None) == tuned.best.get((optimizer, WHOLE)) else ""
                    loss = "failed" if outcome.val_loss is None else f"{outcome.val_loss:.4f}"
                    rows.append([batch, optimizer, f"{rate:g}", loss, mark])
    if len(plan.question.factors) < 2:
        rows = []
    return Table(title="Tuning", columns=["batch", "optimizer", "rate", "loss at the end", ""], rows=rows)
