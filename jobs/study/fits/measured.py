"""Losses over what they have cost, as seeds repeat them, and what they would be if all were measured again.

All intervals of laws and ratios come from one resampling, a parametric bootstrap. A draw moves the mean of each point
by normal noise; how large that noise is, is drawn as well, as what tells it allows: how far seeds lie apart at each
point and points from their law, pooled. For a straight line that gives Student's intervals, which hold for four points,
where resampling the points themselves does not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jobs.study.fits.estimate import CONFIDENCE, Estimate, Unidentified
from jobs.study.fits.linear import Array

DRAWS = 1000


@dataclass(frozen=True)
class Noise:
    """Of the logarithm of one loss."""

    deviation: float
    freedom: int
    """Degrees of freedom from which it was told; 0: nothing tells it."""


@dataclass(frozen=True)
class Measured:
    """Points of a curve, by rising cost."""

    costs: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    """Of the seeds of each."""

    @classmethod
    def of(cls, points: Iterable[tuple[float, Sequence[float]]]) -> "Measured":
        """Return them in order.

        Raises:
            Unidentified: a cost or a loss is not a positive number, or two points have one cost.
        """
        ordered = sorted((cost, tuple(losses)) for cost, losses in points)
        costs = tuple(cost for cost, _ in ordered)
        numbers = [*costs, *(loss for _, losses in ordered for loss in losses)]
        if not all(0 < number < float("inf") for number in numbers) or not all(losses for _, losses in ordered):
            raise Unidentified("a cost or a loss is no positive number")
        if len(set(costs)) < len(costs):
            raise Unidentified("two points have one cost")
        return cls(costs, tuple(losses for _, losses in ordered))

    @cached_property
    def x(self) -> Array:
        """Return the logarithms of the costs."""
        return np.log(self.costs)

    @cached_property
    def y(self) -> Array:
        """Return the mean logarithm of each point's losses."""
        return np.array([np.mean(np.log(losses)) for losses in self.losses])

    @cached_property
    def seeds(self) -> Array:
        """Return how many losses each point has."""
        return np.array([len(losses) for losses in self.losses])

    def noise(self, residuals: Array, parameters: int) -> Noise:
        """Pool how far the seeds lie from their means and the means from a law.

        Args:
            residuals: of the means' logarithms.
            parameters: of the law.
        """
        within = sum(
            float(np.sum((np.log(losses) - mean) ** 2)) for losses, mean in zip(self.losses, self.y, strict=True)
        )
        freedom = max(0, len(self.costs) - parameters) + int(np.sum(self.seeds - 1))
        squares = within + float(np.sum(self.seeds * residuals**2))
        return Noise(float(np.sqrt(squares / freedom)) if freedom else float("nan"), freedom)

    def drawn(self, noise: Noise, rng: np.random.Generator, count: int = DRAWS) -> Array:
        """Return means as they might have been, (count, points); NaN where nothing tells the noise."""
        if not noise.freedom:
            return np.full((count, len(self.costs)), np.nan)
        # What the true deviation may be, given the one that was found.
        deviation = noise.deviation * np.sqrt(noise.freedom / rng.chisquare(noise.freedom, (count, 1)))
        return self.y + deviation * rng.standard_normal((count, len(self.costs))) / np.sqrt(self.seeds)


def interval(value: float, draws: Array, confidence: float = CONFIDENCE) -> Estimate:
    """Return a value with the interval that holds the middle share of its draws.

    A draw that is infinite counts; where one is NaN there is no interval.
    """
    ends = np.sort(draws)
    if np.isnan(ends[-1]):
        return Estimate(value, np.nan, np.nan)
    last = len(ends) - 1
    low, high = (ends[round(share * last)] for share in ((1 - confidence) / 2, (1 + confidence) / 2))
    return Estimate(value, float(low), float(high))
