"""The critical batch by the two-piece model of the steps until a loss is reached.

Essential AI (arXiv 2505.02222, appendix F): `ln S = -ln B + b1` up to B*, `m ln B + b2` beyond, continuous, -1 < m < 0.
In tokens, `T = B S`: as many at every batch up to B*, then more by `(B / B*)^(m + 1)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf

import numpy as np
from scipy.special import stdtrit

from jobs.study.fits.estimate import CONFIDENCE, Estimate, Unidentified
from jobs.study.fits.linear import Array
from jobs.study.fits.measured import Measured

LEAST_BATCHES = 4
_GRID = 2001


@dataclass(frozen=True)
class TwoPiece:
    """The fitted model."""

    critical: Estimate
    """B*, in the unit of the batches. An end at 0 or infinity is beyond the batches that were tried."""
    tokens: float
    """T below it."""
    slope: float
    """m."""

    def tokens_at(self, batch: float) -> float:
        """Return the tokens that a batch needs."""
        return self.tokens * max(1.0, batch / self.critical.value) ** (self.slope + 1)

    def steps_at(self, batch: float) -> float:
        """Return the steps that a batch needs."""
        return self.tokens_at(batch) / batch


def fit_two_piece(tokens: Mapping[float, Sequence[float]], confidence: float = CONFIDENCE) -> TwoPiece:
    """Fit the model for the tokens of each seed, by batch.

    B* is sought on a grid. Its interval is the profile's: the B* with which the points lie hardly farther from the
    model than with the best.

    Raises:
        Unidentified: too few batches, no more tokens at the largest than at the smallest, or no flat part.
    """
    points = Measured.of((batch, of) for batch, of in tokens.items() if of)
    if len(points.costs) < LEAST_BATCHES:
        count = len(points.costs)
        raise Unidentified(f"a critical batch needs {LEAST_BATCHES} batches that come to the loss, not {count}")
    breaks = np.linspace(points.x[0], points.x[-1], _GRID)
    level, rise, squares = _fitted(points, breaks)
    best = int(np.argmin(squares))
    residuals = points.y - (level[best] + rise[best] * np.maximum(0, points.x - breaks[best]))
    noise = points.noise(residuals, 3)
    if not noise.freedom:
        raise Unidentified("a critical batch needs more batches, or seeds: nothing tells how large the noise is")
    allowed = (noise.deviation * stdtrit(noise.freedom, (1 + confidence) / 2)) ** 2
    flat = float(np.sum(points.seeds * (points.y - np.average(points.y, weights=points.seeds)) ** 2))
    if flat - squares[best] <= allowed:
        raise Unidentified(
            f"the largest batch, {points.costs[-1]:g}, needs hardly more tokens than the smaller ones: "
            "the critical batch is beyond it"
        )
    inside = breaks[squares - squares[best] <= allowed]
    # The knee may be anywhere beyond the first batch or the last one that it was compared with.
    low = 0.0 if inside[0] <= breaks[0] else exp(inside[0])
    high = inf if inside[-1] >= breaks[-1] else exp(inside[-1])
    return TwoPiece(Estimate(exp(breaks[best]), low, high), exp(level[best]), float(rise[best]) - 1)


def _fitted(points: Measured, breaks: Array) -> tuple[Array, Array, Array]:
    """Return level, rise within [0, 1] and sum of squares of `y = level + rise max(0, x - break)`, for each break."""
    beyond, seeds = np.maximum(0, points.x - breaks[:, None]), points.seeds
    total = seeds.sum()
    means = beyond @ seeds / total
    mean = points.y @ seeds / total
    spread = np.sum(seeds * (beyond - means[:, None]) ** 2, axis=1)
    rise = np.sum(seeds * (beyond - means[:, None]) * (points.y - mean), axis=1) / np.maximum(spread, 1e-300)
    rise = np.clip(rise, 0, 1)
    level = mean - rise * means
    squares = np.sum(seeds * (points.y - level[:, None] - rise[:, None] * beyond) ** 2, axis=1)
    return level, rise, squares
