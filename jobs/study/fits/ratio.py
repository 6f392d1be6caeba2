"""How much more one curve costs than another for the same loss: the figure that papers call speed-up.

Where both curves have the loss it is read off between their points, by lines in logarithms; beyond them it can only be
projected, from fitted power laws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jobs.study.fits.estimate import CONFIDENCE, Estimate
from jobs.study.fits.linear import Array
from jobs.study.fits.measured import Measured, interval
from jobs.study.fits.power_law import Fit, PowerLaw, fit_lines


@dataclass(frozen=True)
class Ratio:
    """At one loss."""

    loss: float
    value: Estimate
    """Cost of the first curve over that of the second: above 1 the second is cheaper."""


def ratio_of(first: PowerLaw, second: PowerLaw, loss: float) -> float:
    """Return the first law's cost of a loss over the second's."""
    return first.cost(loss) / second.cost(loss)


def common_losses(first: Measured, second: Measured) -> tuple[float, float] | None:
    """Return the lowest and the highest loss that both curves have; None where there is none."""
    low = max(one.y.min() for one in (first, second))
    high = min(one.y[0] for one in (first, second))
    return (float(np.exp(low)), float(np.exp(high))) if low <= high else None


def ratios(first: Fit, second: Fit, losses: Sequence[float], confidence: float = CONFIDENCE) -> list[Ratio]:
    """Return the ratio at losses that both curves have, between their points.

    In a draw whose curve does not come to a loss, it goes on from its end along its law.
    """
    targets, rng = np.log(losses), np.random.default_rng(0)
    middle = _cost(first, first.points.y[None], targets) - _cost(second, second.points.y[None], targets)
    # One generator for both: their noise is independent.
    drawn = [_cost(fit, fit.points.drawn(fit.noise, rng), targets) for fit in (first, second)]
    return _as_ratios(losses, middle[0], drawn[0] - drawn[1], confidence)


def projected(first: Fit, second: Fit, losses: Sequence[float], confidence: float = CONFIDENCE) -> list[Ratio]:
    """Return the ratio of the two laws without floors at losses that not both curves have."""
    targets, rng = np.log(losses), np.random.default_rng(0)
    drawn = [_law_cost(fit, fit.points.drawn(fit.noise, rng), targets) for fit in (first, second)]
    middle = [np.log([fit.law.cost(loss) for loss in losses]) for fit in (first, second)]
    return _as_ratios(losses, middle[0] - middle[1], drawn[0] - drawn[1], confidence)


def _as_ratios(losses: Sequence[float], middle: Array, draws: Array, confidence: float) -> list[Ratio]:
    values = (interval(float(one), of, confidence).exp() for one, of in zip(middle, draws.T, strict=True))
    return [Ratio(loss, value) for loss, value in zip(losses, values, strict=True)]


def _law_cost(fit: Fit, y: Array, targets: Array) -> Array:
    """Return the logarithm of the cost by the power law of each draw, (draws, targets)."""
    level, slope, _ = fit_lines(fit.points, y, np.zeros(len(y)))
    return (level[:, None] - targets) / _falling(slope)[:, None]


def _cost(fit: Fit, y: Array, targets: Array) -> Array:
    """Return the logarithm of the cost at which each draw's line first comes to each target, (draws, targets)."""
    x, slope = fit.points.x, _falling(fit_lines(fit.points, y, np.zeros(len(y)))[1])[:, None]
    reached = y[:, :, None] <= targets  # (draws, points, targets)
    found = np.where(reached[:, 0], x[0] + (y[:, :1] - targets) / slope, x[-1] + (y[:, -1:] - targets) / slope)
    for i in range(len(x) - 1, 0, -1):  # From behind: what remains is the first crossing.
        before, after = y[:, i - 1, None], y[:, i, None]
        crosses = ~reached[:, i - 1] & reached[:, i]
        step = np.where(crosses, before - after, 1.0)
        found = np.where(crosses & ~reached[:, 0], x[i - 1] + (before - targets) / step * (x[i] - x[i - 1]), found)
    return found


def _falling(slope: Array) -> Array:
    """Return slopes of which none is zero or less: such a draw goes on for ever."""
    return np.where(np.isnan(slope), np.nan, np.maximum(slope, 1e-3))
