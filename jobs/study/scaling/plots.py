"""The plots of a scaling law."""

from collections.abc import Sequence
from math import exp, isfinite

import numpy as np

from jobs.study.fits.power_law import Fit
from jobs.study.fits.ratio import Ratio
from jobs.study.question import Curve, Plot
from jobs.study.report.published import moonlight_ratio
from jobs.study.scaling.cells import COSTS, Cell
from jobs.study.scaling.laws import Laws
from jobs.study.scaling.plan import Plan
from jobs.study.scaling.tables import tuning_losses

LINE = 40
"""Points of a law's line."""


def plots_of(plan: Plan, cells: list[Cell], laws: Laws) -> list[Plot]:
    """Return all plots that have a curve."""
    names = {"FLOPs of the model": "compute", "seconds in steps": "seconds"}
    plots = [_losses(name, cost, laws) for cost, name in names.items()]
    plots += [_ratio(plan, laws, cost, f"ratio-{name}") for cost, name in names.items()]
    plots += [_tuning(plan, size) for size in plan.tuned]
    return [plot for plot in plots if any(not curve.context for curve in plot.curves)]


def _losses(name: str, cost: str, laws: Laws) -> Plot:
    curves = []
    for (optimizer, of), law in laws.laws.items():
        if of == cost:
            curves += [_points(optimizer, law.fit), _line(f"{optimizer}: A C^-b", law.fit)]
            if law.with_floor:
                curves.append(_line(f"{optimizer}: E + A C^-b", law.with_floor))
    return Plot(
        name=f"loss-{name}",
        title=f"Loss over {cost}",
        x=cost,
        y="validation loss (nats per token)",
        curves=curves,
        log_x=True,
        log_y=True,
        note="Points: means over the seeds.",
    )


def _points(label: str, fit: Fit) -> Curve:
    return Curve(label=label, x=fit.points.costs, y=[exp(one) for one in fit.points.y], kind="points")


def _line(label: str, fit: Fit) -> Curve:
    x = [float(one) for one in np.geomspace(fit.points.costs[0], fit.points.costs[-1], LINE)]
    return Curve(label=label, x=x, y=[fit.law.loss(one) for one in x], kind="line")


def _ratio(plan: Plan, laws: Laws, cost: str, name: str) -> Plot:
    of = [one for one in laws.ratios if one.cost == cost]
    curves = [_band(f"{one.optimizer}, measured", one.measured) for one in of if one.measured]
    curves += [_band(f"{one.optimizer}, projected", one.projected) for one in of if one.projected]
    if cost == next(iter(COSTS)):
        curves.append(moonlight_ratio())
    return Plot(
        name=name,
        title=f"{cost}: {plan.question.baseline} over others, for the same loss",
        x="validation loss (nats per token)",
        y=f"{cost} of {plan.question.baseline} over the other's",
        curves=curves,
        log_y=True,
        marks=[1.0],
        note="Bands: 95 %. Losses of others are of other texts and tokenizers: compare heights, not places.",
    )


def _band(label: str, ratios: Sequence[Ratio]) -> Curve:
    known = all(isfinite(one.value.low + one.value.high) for one in ratios)
    return Curve.of(label, [one.loss for one in ratios], [one.value for one in ratios], bounded=known)


def _tuning(plan: Plan, size: str) -> Plot:
    curves = []
    for optimizer in plan.tuned[size].tried:
        for budget in sorted(plan.question.budgets):
            losses = tuning_losses(plan, size, optimizer, budget)
            for decay in dict.fromkeys(decay for _, decay in losses):
                along = sorted((rate, loss) for (rate, of), loss in losses.items() if of == decay and isfinite(loss))
                label = optimizer + (f", {budget:g} {plan.question.unit}" if len(plan.question.budgets) > 1 else "")
                label += "" if decay is None else f", decay {decay:g}"
                curves.append(Curve(label=label, x=[rate for rate, _ in along], y=[loss for _, loss in along]))
    return Plot(
        name=f"tuning-{size}",
        title=f"Tuning at size {size}",
        x="learning rate",
        y="validation loss (nats per token)",
        curves=[curve for curve in curves if curve.x],
        log_x=True,
    )
