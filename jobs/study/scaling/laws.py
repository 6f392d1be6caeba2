"""The laws of the optimizers and the ratios between them, each found or refused with the reason."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp, log

from jobs.study.fits.estimate import Unidentified
from jobs.study.fits.power_law import Fit, fit_power_law, fit_with_floor
from jobs.study.fits.ratio import Ratio, common_losses, projected, ratios
from jobs.study.fits.surface import Point, Surface, fit_surface
from jobs.study.scaling.cells import COSTS, Cell, curve_of

LEVELS = 12
"""Losses of a ratio's curve."""
BEYOND = (2.0, 4.0, 10.0)
"""Times the largest cost: up to where a ratio is projected."""


@dataclass(frozen=True)
class Law:
    """Of an optimizer, over one kind of cost."""

    fit: Fit
    with_floor: Fit | None
    refusal: str = ""
    """Why there is no irreducible term."""


@dataclass(frozen=True)
class Ratios:
    """Of the baseline's cost over another optimizer's, for one kind of cost."""

    optimizer: str
    cost: str
    first: Fit
    """Of the baseline."""
    second: Fit
    measured: list[Ratio]
    """By falling loss; empty where no loss is known of both."""
    projected: list[Ratio]


@dataclass
class Laws:
    """All that could be fitted, and why the rest could not."""

    laws: dict[tuple[str, str], Law] = field(default_factory=dict)
    """By optimizer and cost."""
    surfaces: dict[str, Surface] = field(default_factory=dict)
    ratios: list[Ratios] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def laws_of(cells: Sequence[Cell], optimizers: Sequence[str], baseline: str) -> Laws:
    """Fit everything.

    Args:
        cells: of all optimizers.
        optimizers: in order.
        baseline: the one whose cost is divided by the others'.
    """
    found, several = Laws(), len({cell.budget for cell in cells}) > 1
    for optimizer in optimizers:
        of = [cell for cell in cells if cell.optimizer == optimizer]
        for name, cost in COSTS.items():
            with _told(found, f"{optimizer}, {name}"):
                found.laws[optimizer, name] = _law(of, cost, several)
        if several:
            with _told(found, f"{optimizer}, loss in parameters and tokens"):
                points = [Point(cell.parameters, cell.tokens, cell.loss) for cell in of]
                found.surfaces[optimizer] = fit_surface(points)
    for optimizer in optimizers:
        for name in COSTS:
            first, second = found.laws.get((baseline, name)), found.laws.get((optimizer, name))
            if optimizer != baseline and first and second:
                found.ratios.append(_ratios(optimizer, name, first.fit, second.fit))
    return found


@contextmanager
def _told(found: Laws, what: str) -> Iterator[None]:
    try:
        yield
    except Unidentified as error:
        found.refusals.append(f"{what}: not fitted: {error}")


def _law(cells: Sequence[Cell], cost: Callable[[Cell], float], several: bool) -> Law:
    points = curve_of(cells, cost, several)
    fit = fit_power_law(points)
    try:
        return Law(fit, fit_with_floor(points))
    except Unidentified as error:
        return Law(fit, None, str(error))


def _ratios(optimizer: str, cost: str, first: Fit, second: Fit) -> Ratios:
    common = common_losses(first.points, second.points)
    measured = ratios(first, second, _between(common[1], common[0])) if common else []
    largest = max(first.points.costs[-1], second.points.costs[-1])
    reached = min(exp(min(fit.points.y)) for fit in (first, second))
    beyond = [min(fit.law.loss(times * largest) for fit in (first, second)) for times in BEYOND]
    if not common:  # From where the one ends to where the other begins, and beyond.
        beyond = [reached, *beyond]
    return Ratios(
        optimizer, cost, first, second, measured, projected(first, second, [one for one in beyond if one <= reached])
    )


def _between(high: float, low: float) -> list[float]:
    """Return losses in equal ratios, both ends included; one where they are the same."""
    if low == high:
        return [low]
    return [exp(log(high) + (log(low) - log(high)) * i / (LEVELS - 1)) for i in range(LEVELS)]
