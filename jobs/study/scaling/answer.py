"""The answer of a scaling law: the finding first, then tables and plots of all that it stands on."""

from collections.abc import Mapping
from dataclasses import asdict
from math import isinf, sqrt
from typing import Any

from jobs.study.fits.estimate import Unidentified
from jobs.study.fits.minimum import minimum
from jobs.study.fits.ratio import Ratio
from jobs.study.numbers import outside, text_of
from jobs.study.question import Answer, Setting
from jobs.study.scaling.cells import Cell, cells_of
from jobs.study.scaling.laws import Laws, Ratios, laws_of
from jobs.study.scaling.plan import Plan
from jobs.study.scaling.plots import plots_of
from jobs.study.scaling.tables import tables_of, tuning_losses

NEAREST = 5
"""Learning rates around the best through which the parabola of a setting's interval goes."""


def answer_of(plan: Plan) -> Answer:
    """Return what the outcomes come to, as far as they are."""
    cells = cells_of(plan)
    laws = laws_of(cells, [*plan.optimizers], plan.question.baseline)
    best = _best(plan, cells)
    return Answer(
        headline=headline(plan, cells, laws),
        facts=_facts(cells, laws),
        tables=tables_of(plan, cells, laws),
        plots=plots_of(plan, cells, laws),
        notes=_notes(plan, cells, laws),
        settings=_settings(plan, cells, best) if best else {},
        found_at=plan.sizes[best.size] if best else {},
    )


def headline(plan: Plan, cells: list[Cell], laws: Laws) -> str:
    """Say first whether there is a difference, and how large it is."""
    baseline = plan.question.baseline
    of_model = [one for one in laws.ratios if one.cost == "FLOPs of the model"]
    if not of_model:
        known = len({cell.size for cell in cells})
        return f"No ratio yet: {known} of {len(plan.sizes)} sizes have a loss, and a law needs two of each optimizer"
    return "; ".join(_finding(one, baseline) for one in of_model)


def _finding(found: Ratios, baseline: str) -> str:
    if not found.measured:
        return _bound(found, baseline)
    lowest = found.measured[-1]
    ratio, at = (
        lowest.value,
        f"C_{baseline} / C_{found.optimizer} at {lowest.loss:.4g} nats, the lowest that both reach",
    )
    if not ratio.known:
        return f"{at}: {text_of(ratio)}; nothing tells the noise"
    if not outside(ratio, 1.0):
        return f"Within the noise: {at}, is {text_of(ratio)}"
    if ratio.value > 1:
        return f"{found.optimizer} needs {text_of(ratio)} times fewer FLOPs than {baseline}: {at}"
    return f"{found.optimizer} needs more FLOPs than {baseline}: {at}, is {text_of(ratio)}"


def _bound(found: Ratios, baseline: str) -> str:
    """Say what is known where the cheapest run of one comes lower than the dearest of the other."""
    first, second = found.first.points, found.second.points
    if second.y.max() < first.y.min():
        least = first.costs[-1] / second.costs[0]
        return f"{found.optimizer} needs less than 1/{least:.3g} of {baseline}'s FLOPs: no loss is known of both"
    least = second.costs[-1] / first.costs[0]
    return f"{found.optimizer} needs more than {least:.3g} times {baseline}'s FLOPs: no loss is known of both"


def _facts(cells: list[Cell], laws: Laws) -> dict[str, Any]:
    return {
        "points": [
            {
                **{key: getattr(cell, key) for key in ("size", "optimizer", "budget", "parameters", "tokens")},
                **{key: getattr(cell, key) for key in ("flops", "all_flops", "seconds", "losses")},
                "lr": cell.choice[0],
                "weight_decay": cell.choice[1],
            }
            for cell in cells
        ],
        "laws": [
            {
                "optimizer": optimizer,
                "cost": cost,
                "scale": asdict(law.fit.scale),
                "exponent": asdict(law.fit.exponent),
                "floor": law.with_floor and law.with_floor.floor and asdict(law.with_floor.floor),
                "exponent_with_floor": law.with_floor and asdict(law.with_floor.exponent),
                "noise": law.fit.noise.deviation,
            }
            for (optimizer, cost), law in laws.laws.items()
        ],
        "surfaces": {
            optimizer: {key: asdict(getattr(surface, key)) for key in ("floor", "alpha", "beta")}
            for optimizer, surface in laws.surfaces.items()
        },
        "ratios": [
            {
                "optimizer": one.optimizer,
                "cost": one.cost,
                "measured": list(map(_ratio_fact, one.measured)),
                "projected": list(map(_ratio_fact, one.projected)),
            }
            for one in laws.ratios
        ],
        "refused": laws.refusals,
    }


def _ratio_fact(ratio: Ratio) -> dict[str, float]:
    return {"loss": ratio.loss, **asdict(ratio.value), "inverse": 1 / ratio.value.value}


def _notes(plan: Plan, cells: list[Cell], laws: Laws) -> list[str]:
    question = plan.question
    tried = {name: sum(len(one.tried[name]) for one in plan.tuned.values()) for name in plan.tuned_optimizers}
    effort = ", ".join(f"{name} {count}" for name, count in tried.items())
    what = "learning rate and weight decay" if question.weight_decays else "learning rate"
    notes = [
        f"Tuned: {what}, for each size; trials: {effort}.",
        "Only validation losses at the end of a schedule are compared.",
        f"The tuning has seed {plan.first_seed}; the best of each size was trained with {len(plan.study.seeds)} "
        "seed(s). The tuning's own loss is one of them, and as the least of several a little too low, alike for all.",
        "Intervals (95 %): all losses are drawn anew, with noise as large as the distances of seeds from their mean "
        "and of points from their law tell, pooled for each optimizer; how large it is, is drawn, too.",
        "Between points a curve is a straight line in logarithms. What is projected stands on the laws alone.",
        "Seconds are those of this machine with what ran beside; FLOPs of the optimizer are counted apart.",
    ]
    if question.reuse:
        others = ", ".join(name for name in plan.optimizers if name != question.reuse)
        notes.insert(1, f"{others}: not tuned, with the best of {question.reuse} as it is (as Moonlight did).")
    for size, tuned in plan.tuned.items():
        if tuned.extended:
            notes.append(f"Size {size}: the grid grew {tuned.extended} time(s), for all optimizers alike.")
        ends = [f"{name} ({budget:g})" for (name, budget), border in tuned.border.items() if border]
        if tuned.finished and ends:
            notes.append(
                f"Size {size}: the best is at an end of the grid still for {', '.join(ends)}: it may be better."
            )
    for (optimizer, cost), law in laws.laws.items():
        if law.refusal and cost == "FLOPs of the model":
            notes.append(f"{optimizer}: no irreducible term E: {law.refusal}.")
    return [*notes, *laws.refusals]


def _best(plan: Plan, cells: list[Cell]) -> Cell | None:
    """Return the best optimizer's at the largest size, with the most tokens; None until all are there."""
    if not cells:
        return None
    largest = max(cells, key=lambda cell: (cell.parameters, cell.tokens))
    among = [cell for cell in cells if (cell.size, cell.budget) == (largest.size, largest.budget)]
    return min(among, key=lambda cell: cell.loss) if len(among) == len(plan.optimizers) else None


def _settings(plan: Plan, cells: list[Cell], best: Cell) -> dict[str, Setting]:
    """Return optimizer, rate and decay of the best."""
    rate, decay = best.choice
    losses = tuning_losses(plan, best.size, plan.question.reuse or best.optimizer, best.budget)
    why = f"{best.optimizer} at size {best.size}, {best.parameters:,} parameters, {best.tokens:,} tokens"
    along = {one: loss for (one, of), loss in losses.items() if of == decay}
    settings = {key: Setting(value=value, why=why) for key, value in plan.optimizers[best.optimizer].items()}
    settings["optim.lr"] = _tuned(rate, along, _noise(cells, best.optimizer), why)
    if decay is not None:
        decays = {of: loss for (one, of), loss in losses.items() if one == rate and of}
        settings["optim.weight_decay"] = _tuned(decay, decays, _noise(cells, best.optimizer), why)
    return settings


def _tuned(value: float, losses: Mapping[float, float], noise: float | None, why: str) -> Setting:
    """Return a setting with the interval of the parabola's minimum, where the losses have one."""
    try:
        at = minimum([*losses], [*losses.values()], noise, NEAREST).at
    except Unidentified:
        return Setting(value=value, why=why)
    if not at.known or isinf(at.high) or value not in at:
        return Setting(value=value, why=why)
    return Setting(value=value, low=at.low, high=at.high, why=f"{why}; the parabola's minimum is {at.value:.3g}")


def _noise(cells: list[Cell], optimizer: str) -> float | None:
    """Return the standard deviation between an optimizer's seeds, in nats, pooled over sizes; None: each has one."""
    of = [cell for cell in cells if cell.optimizer == optimizer]
    freedom = sum(len(cell.losses) - 1 for cell in of)
    squares = sum((loss - cell.loss) ** 2 for cell in of for loss in cell.losses)
    return sqrt(squares / freedom) if freedom else None
