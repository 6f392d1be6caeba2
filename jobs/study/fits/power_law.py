"""Power laws of a loss in what it costs: `L = A C^-b`, and `L = E + A C^-b` where the points tell E.

The Huber loss of the residuals of `ln L` is minimized, as in Hoffmann et al. (arXiv 2203.15556, appendix D.3). For a
given E that is nearly a straight line, so E is sought on a grid that narrows, which is the grid of starts and the
profile of the likelihood at once; all draws of the bootstrap are fitted together.
"""

from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
from scipy.special import stdtrit

from jobs.study.fits.estimate import CONFIDENCE, Estimate, Unidentified
from jobs.study.fits.linear import Array
from jobs.study.fits.measured import DRAWS, Measured, Noise, interval

HUBER = 0.01
"""Residual of `ln L` up to which it counts by its square: seeds lie within, a run that went wrong beyond."""
LEAST_RANGE, LEAST_RANGE_FLOOR = 2.0, 30.0
"""Largest cost over the smallest from which a slope, and a bend of the line, are told."""
LEAST_POINTS_FLOOR = 4
_STEPS, _GRID, _HIGHEST = 12, 17, 0.98
_ZOOMS, _ZOOMS_DRAWN = 7, 4
"""Each makes the step of the grid an eighth."""
_PROFILE = 2000


@dataclass(frozen=True)
class PowerLaw:
    """`L = floor + scale * C^-exponent`."""

    scale: float
    exponent: float
    floor: float = 0.0

    def loss(self, cost: float) -> float:
        """Return the loss at a cost."""
        return self.floor + self.scale * cost**-self.exponent

    def cost(self, loss: float) -> float:
        """Return the cost of a loss; infinite where it is never reached."""
        if loss <= self.floor:
            return inf
        return exp(min(700.0, (log(self.scale) - log(loss - self.floor)) / self.exponent))


@dataclass(frozen=True)
class Fit:
    """A power law through points."""

    points: Measured
    law: PowerLaw
    scale: Estimate
    exponent: Estimate
    floor: Estimate | None
    """None where there is none."""
    noise: Noise


def fit_power_law(points: Measured, confidence: float = CONFIDENCE) -> Fit:
    """Fit `L = A C^-b`.

    Raises:
        Unidentified: fewer than two points, costs that hardly differ, or losses that do not fall.
    """
    _require(points, 2, LEAST_RANGE, "an exponent")
    zero = np.zeros(1)
    level, slope, _ = fit_lines(points, points.y[None], zero)
    if slope[0] <= 0:
        raise Unidentified(f"the losses do not fall as the cost rises (exponent {slope[0]:.3g})")
    noise = points.noise(points.y - (level[0] - slope[0] * points.x), 2)
    levels, slopes, _ = fit_lines(points, points.drawn(noise, np.random.default_rng(0)), zero)
    return Fit(
        points=points,
        law=PowerLaw(exp(level[0]), float(slope[0])),
        scale=interval(level[0], levels, confidence).exp(),
        exponent=interval(float(slope[0]), slopes, confidence),
        floor=None,
        noise=noise,
    )


def fit_with_floor(points: Measured, confidence: float = CONFIDENCE, draws: int = DRAWS // 4) -> Fit:
    """Fit `L = E + A C^-b`.

    Raises:
        Unidentified: too few points, costs that lie too near to one another, or an E that is within the noise.
    """
    _require(points, LEAST_POINTS_FLOOR, LEAST_RANGE_FLOOR, "an irreducible loss E")
    plain = fit_power_law(points, confidence)
    level, slope, floor = (one[0] for one in _with_floors(points, points.y[None], _ZOOMS))
    noise = points.noise(points.y - np.log(floor + np.exp(level - slope * points.x)), 3)
    low, high = _profile(points, noise, confidence)
    if not low > 0:
        raise Unidentified(
            f"E is within the noise: {floor:.3g} would be best, and 0 cannot be told from it; "
            f"b = {plain.law.exponent:.3g} is an effective exponent, over these costs alone"
        )
    if high >= _HIGHEST * exp(points.y.min()):
        raise Unidentified(f"E is {low:.3g} or more, up to the lowest loss itself: the losses hardly fall any more")
    levels, slopes, _ = _with_floors(points, points.drawn(noise, np.random.default_rng(0), draws), _ZOOMS_DRAWN)
    return Fit(
        points=points,
        law=PowerLaw(exp(level), float(slope), float(floor)),
        scale=interval(level, levels, confidence).exp(),
        exponent=interval(float(slope), slopes, confidence),
        floor=Estimate(float(floor), low, high),
        noise=noise,
    )


def fit_lines(points: Measured, y: Array, floor: Array) -> tuple[Array, Array, Array]:
    """Fit `y = ln(floor + exp(level - slope x))` for given floors by Gauss-Newton, reweighted as Huber's loss asks.

    Args:
        points: whose `x` and numbers of seeds count.
        y: (..., points).
        floor: (...), below every loss.

    Returns:
        Level, slope, and the Huber loss, each (...).
    """
    x, losses, below = points.x, np.exp(y), floor[..., None]
    level, slope = _line(x, np.log(losses - below), points.seeds * (1 - below / losses) ** 2)
    for _ in range(_STEPS):
        residual, share = _residuals(x, y, level, slope, below)
        size = np.abs(residual)
        weight = points.seeds * share**2 * np.where(size > HUBER, HUBER / np.maximum(size, HUBER), 1.0)
        more_level, more_slope = _line(x, residual / share, weight)
        level, slope = level + more_level, slope + more_slope
        if not np.nanmax(np.abs(more_slope), initial=0.0) > 1e-10:
            break
    size = np.abs(_residuals(x, y, level, slope, below)[0])
    each = np.where(size > HUBER, HUBER * (size - HUBER / 2), size**2 / 2)
    return level, slope, np.sum(points.seeds * each, axis=-1)


def _residuals(x: Array, y: Array, level: Array, slope: Array, floor: Array) -> tuple[Array, Array]:
    """Return what is left of `y`, and the share of the loss above the floor."""
    power = np.exp(np.clip(level[..., None] - slope[..., None] * x, -700, 700))
    return y - np.log(floor + power), power / (floor + power)


def _line(x: Array, z: Array, weight: Array) -> tuple[Array, Array]:
    """Return the weighted least squares' `level` and `slope` of `z = level - slope x`."""
    total = np.sum(weight, axis=-1, keepdims=True)
    x_mean, z_mean = (
        np.sum(weight * x, axis=-1, keepdims=True) / total,
        np.sum(weight * z, axis=-1, keepdims=True) / total,
    )
    slope = -np.sum(weight * (x - x_mean) * (z - z_mean), axis=-1) / np.sum(weight * (x - x_mean) ** 2, axis=-1)
    return z_mean[..., 0] + slope * x_mean[..., 0], slope


def _with_floors(points: Measured, y: Array, zooms: int) -> tuple[Array, Array, Array]:
    """Return level, slope and floor of each of `y` (draws, points); the floor is the best of a grid that narrows."""
    level = slope = best = np.full(len(y), np.nan)
    if np.isnan(y).any():
        return level, slope, best
    low, high, rows = np.zeros(len(y)), _HIGHEST * np.exp(y.min(axis=-1)), np.arange(len(y))
    for _ in range(zooms):
        floors = np.linspace(low, high, _GRID, axis=-1)
        levels, slopes, rest = fit_lines(points, y[:, None, :], floors)
        at = np.argmin(rest, axis=-1)
        low, high = floors[rows, np.maximum(at - 1, 0)], floors[rows, np.minimum(at + 1, _GRID - 1)]
        level, slope, best = levels[rows, at], slopes[rows, at], floors[rows, at]
    return level, slope, best


def _profile(points: Measured, noise: Noise, confidence: float) -> tuple[float, float]:
    """Return the interval of floors with which the points lie hardly farther from their law than with the best one."""
    if not noise.freedom:
        return 0.0, inf
    floors = np.linspace(0, _HIGHEST * exp(points.y.min()), _PROFILE)
    rest = fit_lines(points, np.broadcast_to(points.y, (_PROFILE, len(points.y))), floors)[2]
    allowed = (noise.deviation * stdtrit(noise.freedom, (1 + confidence) / 2)) ** 2
    inside = floors[2 * (rest - rest.min()) <= allowed]  # Twice Huber's loss is a sum of squares.
    return float(inside[0]), float(inside[-1])


def _require(points: Measured, least: int, span: float, what: str) -> None:
    if (count := len(points.costs)) < least:
        raise Unidentified(f"{what} needs {least} points, not {count}")
    if (found := points.costs[-1] / points.costs[0]) < span:
        raise Unidentified(f"{what} needs costs that span a factor of {span:g}, not {found:.3g}")
