"""The plots of a batch-size study."""

from collections.abc import Sequence

from jobs.study.batches.found import Level
from jobs.study.batches.levels import Run
from jobs.study.batches.plan import Plan
from jobs.study.fits.batch import Place
from jobs.study.question import Curve, Plot


def plots_of(plan: Plan, runs: Sequence[Run], levels: Sequence[Level], places: dict[str, list[Place]]) -> list[Plot]:
    """Return all plots that have a curve."""
    plots = [_ratio(plan, levels), *(_tokens(number, level) for number, level in enumerate(levels, 1))]
    return [plot for plot in (*plots, _losses(plan, runs), _pareto(places)) if plot.curves]


def _ratio(plan: Plan, levels: Sequence[Level]) -> Plot:
    curves = []
    for level in levels:
        for name, ratios in level.ratios.items():
            known = all(one.known for one in ratios.values())
            curve = Curve.of(f"{name}, {level.loss:.4g} nats", [*ratios], [*ratios.values()], bounded=known)
            curves += [curve] if ratios else []
    return Plot(
        name="token-ratio",
        title=f"Token ratio R_L(B): {plan.question.baseline} over others",
        x="batch (tokens)",
        y=f"tokens of {plan.question.baseline} over the other's",
        curves=curves,
        log_x=True,
        marks=[1.0],
        note="Above 1 the other needs fewer tokens. Bands: 95 %.",
    )


def _tokens(number: int, level: Level) -> Plot:
    curves = []
    for name, one in level.of.items():
        if means := one.means:
            curves.append(Curve(label=name, x=[*means], y=[*means.values()], kind="points"))
        if one.critical:
            # With the knee itself: a line between the batches would cut it off.
            x = sorted({*means, one.critical.critical.value})
            y = [one.critical.tokens_at(batch) for batch in x]
            curves.append(Curve(label=f"{name}: two pieces", x=x, y=y, kind="line"))
    return Plot(
        name=f"tokens-{number}",
        title=f"Tokens until {level.loss:.4g} nats",
        x="batch (tokens)",
        y="tokens",
        curves=curves,
        log_x=True,
        log_y=True,
    )


def _losses(plan: Plan, runs: Sequence[Run]) -> Plot:
    first = [run for run in runs if run.outcome.coordinates["seed"] == plan.first_seed]
    curves = []
    for run in first:
        known = [(tokens, loss) for tokens, loss in run.curve if tokens > 0]
        label = f"{run.optimizer}, {run.batch}"
        curves.append(Curve(label=label, x=[one for one, _ in known], y=[loss for _, loss in known], kind="line"))
    return Plot(
        name="losses",
        title=f"{plan.question.losses.capitalize()} losses",
        x="tokens",
        y="loss (nats per token)",
        curves=curves,
        log_x=True,
    )


def _pareto(places: dict[str, list[Place]]) -> Plot:
    curves = [
        Curve(label=name, x=[place.seconds / 3600 for place in of], y=[place.devices for place in of])
        for name, of in places.items()
        if of
    ]
    return Plot(
        name="pareto-simulated",
        title="Simulated: devices and time until the lowest loss",
        x="hours",
        y="devices",
        curves=curves,
        log_x=True,
        log_y=True,
        note="Steps as measured, seconds of a step as the plan estimates them.",
    )
