"""The tables of a scaling law."""

from statistics import stdev

from jobs.study.fits.ratio import Ratio
from jobs.study.numbers import text_of
from jobs.study.question import Table
from jobs.study.scaling.cells import Cell
from jobs.study.scaling.laws import Laws
from jobs.study.scaling.plan import Plan
from jobs.study.tuning import Choice


def tables_of(plan: Plan, cells: list[Cell], laws: Laws) -> list[Table]:
    """Return all tables that have a row."""
    tables = [_losses(plan, cells), _ratios(plan, laws), _laws(laws), _surfaces(laws), _costs(cells), _tuning(plan)]
    return [table for table in tables if table.rows]


def tuning_losses(plan: Plan, size: str, optimizer: str, budget: float) -> dict[Choice, float]:
    """Return the losses of the tuning that are known; infinite where a trial failed."""
    tuned = plan.tuned.get(size)
    tried = tuned.tried.get(optimizer, []) if tuned else []
    losses = {choice: plan.loss(size, optimizer, choice, plan.first_seed, budget) for choice in tried}
    return {choice: loss for choice, loss in losses.items() if loss is not None}


def _losses(plan: Plan, cells: list[Cell]) -> Table:
    rows = []
    for cell in cells:
        spread = f"{stdev(cell.losses):.2g}" if len(cell.losses) > 1 else None
        trials = len(tuning_losses(plan, cell.size, cell.optimizer, cell.budget))
        rate, decay = cell.choice
        rows.append(
            [
                *(cell.size, cell.parameters, cell.tokens, cell.optimizer, f"{rate:g}", decay, trials),
                *(f"{cell.loss:.4f}", spread, len(cell.losses)),
            ]
        )
    return Table(
        title="Losses at the best learning rate",
        columns=[
            *("size", "parameters", "tokens", "optimizer", "rate", "weight decay", "trials of tuning"),
            *("loss, mean", "standard deviation", "seeds"),
        ],
        rows=rows,
        note="Parameters are without embedding and head. Validation losses at the end, nats per token.",
    )


def _ratios(plan: Plan, laws: Laws) -> Table:
    rows = []
    for one in laws.ratios:
        for kind, ratios in (("measured", _thinned(one.measured)), ("projected", one.projected)):
            rows += [
                [
                    one.optimizer,
                    one.cost,
                    kind,
                    f"{ratio.loss:.4g}",
                    text_of(ratio.value),
                    f"{1 / ratio.value.value:.3g}",
                ]
                for ratio in ratios
            ]
    return Table(
        title=f"Cost of {plan.question.baseline} over that of others for the same loss",
        columns=["other optimizer", "cost", "", "loss, nats per token", "ratio", "1 / ratio"],
        rows=rows,
        note="Above 1 the other is cheaper. With 95 % intervals.",
    )


def _thinned(ratios: list[Ratio]) -> list[Ratio]:
    """Return every so manieth from the last one on, four at most; the plot has all."""
    return ratios[:: -max(1, -(-len(ratios) // 4))][::-1]


def _laws(laws: Laws) -> Table:
    rows = []
    for (optimizer, cost), law in laws.laws.items():
        floor = law.with_floor
        rows.append(
            [
                *(optimizer, cost, text_of(law.fit.scale), text_of(law.fit.exponent), len(law.fit.points.costs)),
                *(text_of(floor.floor) if floor else "not identified", text_of(floor.exponent) if floor else None),
            ]
        )
    return Table(
        title="Laws: L = A C^-b, and L = E + A C^-b where the points tell E",
        columns=["optimizer", "C", "A", "b", "points", "E", "b beside E"],
        rows=rows,
    )


def _surfaces(laws: Laws) -> Table:
    rows = [
        [optimizer, *(text_of(getattr(surface, key)) for key in ("floor", "alpha", "beta"))]
        for optimizer, surface in laws.surfaces.items()
    ]
    return Table(title="L = E + A N^-alpha + B D^-beta", columns=["optimizer", "E", "alpha", "beta"], rows=rows)


def _costs(cells: list[Cell]) -> Table:
    rows = [
        [cell.size, cell.optimizer, cell.tokens, cell.flops, cell.all_flops - cell.flops, cell.seconds]
        for cell in cells
    ]
    columns = ["size", "optimizer", "tokens", "FLOPs of the model", "FLOPs of the optimizer", "seconds in steps"]
    return Table(title="Cost of a run", columns=columns, rows=rows)


def _tuning(plan: Plan) -> Table:
    rows = []
    for size, tuned in plan.tuned.items():
        for optimizer in tuned.tried:
            for budget in sorted(plan.question.budgets):
                losses = tuning_losses(plan, size, optimizer, budget)
                best = plan.best(size, optimizer, budget)
                for (rate, decay), loss in sorted(losses.items(), key=lambda one: (one[0][1] or 0, one[0][0])):
                    mark = "best" if (rate, decay) == best else ""
                    rows.append([size, optimizer, budget, f"{rate:g}", decay, f"{loss:.4f}", mark])
    return Table(
        title="Tuning",
        columns=["size", "optimizer", plan.question.unit, "rate", "weight decay", "loss", ""],
        rows=rows,
        note="Infinite: the trial failed.",
    )
