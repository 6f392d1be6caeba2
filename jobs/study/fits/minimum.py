"""Where a loss is least along a hyper-parameter: a parabola in its logarithm."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log, nan, sqrt

import numpy as np

from jobs.study.fits.estimate import CONFIDENCE, Estimate, Unidentified
from jobs.study.fits.linear import LeastSquares, least_squares


@dataclass(frozen=True)
class Minimum:
    """The minimum of a fitted parabola."""

    at: Estimate
    """The hyper-parameter's value."""
    loss: float
    curvature: float
    """Of the loss in the logarithm: half of it times `ln(x / at)^2` is what another value costs."""
    border: bool
    """The least loss that was measured is at an end of the grid, or the minimum beyond one: a guess; widen the grid."""


def minimum(
    values: Sequence[float],
    losses: Sequence[float | None],
    noise: float | None = None,
    nearest: int = 0,
    confidence: float = CONFIDENCE,
) -> Minimum:
    """Fit `loss = a + b u + c u^2`, `u = ln(value)`, and return its minimum.

    The interval is Fieller's, of the ratio of two coefficients: the values at which the slope may be zero. It is exact
    for normal noise where the parabola holds, and unbounded where the points hardly bend.

    Args:
        values: of the hyper-parameter, positive; one may be there several times.
        losses: of each; what is None or not finite is left out.
        noise: standard deviation of a loss, as seeds tell; None: the residuals tell it.
        nearest: so many different values, around the best one, are fitted: the parabola holds near it; 0: all.
        confidence: of the interval.

    Raises:
        Unidentified: fewer than three values have a loss, or the losses do not bend upwards.
    """
    found = [(x, y) for x, y in zip(values, losses, strict=True) if y is not None and np.isfinite(y)]
    grid = sorted({x for x, _ in found})
    if len(grid) < 3:
        raise Unidentified(f"a minimum needs three values with a loss, not {len(grid)}")
    best = _best(found)
    kept = set(sorted(grid, key=lambda x: abs(log(x / best)))[: max(3, nearest)] if nearest else grid)
    x, y = np.array([point for point in found if point[0] in kept]).T
    u = np.log(x / best)  # Around the best: the columns are then as independent as they can be.
    fit = least_squares([np.ones_like(u), u, u**2], y, noise or None, confidence)
    level, slope, bend = map(float, fit.coefficients)
    if bend <= 0:
        raise Unidentified(f"the losses between {min(kept):.4g} and {max(kept):.4g} do not bend upwards")
    middle = -slope / (2 * bend)
    low, high = _fieller(fit)
    at = Estimate(*(log(best) + one for one in (middle, low, high))).exp()
    return Minimum(
        at=at,
        loss=level - slope**2 / (4 * bend),
        curvature=2 * bend,
        border=best in (grid[0], grid[-1]) or not grid[0] <= at.value <= grid[-1],
    )


def _best(found: Sequence[tuple[float, float]]) -> float:
    """Return the value whose mean loss is least."""
    means = {x: float(np.mean([y for at, y in found if at == x])) for x, _ in found}
    return min(means, key=means.__getitem__)


def _fieller(fit: LeastSquares) -> tuple[float, float]:
    """Return the interval of `u` at which the slope `b + 2 c u` may be zero."""
    (_, slope, bend), reach, covariance = fit.coefficients, fit.reach**2, fit.covariance
    if not np.isfinite(reach * covariance[2, 2]):
        return nan, nan
    # (b + 2 c u)^2 <= reach^2 (Vbb + 4 u Vbc + 4 u^2 Vcc)
    square = 4 * (bend**2 - reach * covariance[2, 2])
    line = 4 * (slope * bend - reach * covariance[1, 2])
    level = slope**2 - reach * covariance[1, 1]
    if square <= 0:  # The bend itself may be zero.
        return -inf, inf
    root = sqrt(max(0.0, line**2 - 4 * square * level))
    return (-line - root) / (2 * square), (-line + root) / (2 * square)
