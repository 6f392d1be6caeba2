"""Linear least squares with its intervals: what the fits that are linear in their coefficients stand on."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

from jobs.study.fits.estimate import CONFIDENCE, Estimate, Unidentified

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class LeastSquares:
    """Coefficients with their covariance."""

    coefficients: Array
    covariance: Array
    """NaN where no residual tells the noise."""
    reach: float
    """Standard deviations from the middle of an interval to its end: Student's quantile, or the normal one."""

    def estimate(self, weights: ArrayLike) -> Estimate:
        """Return the sum of the coefficients, each times its weight, for instance a prediction."""
        weights = np.asarray(weights, float)
        middle, variance = float(weights @ self.coefficients), float(weights @ self.covariance @ weights)
        around = self.reach * sqrt(max(0.0, variance)) if variance == variance else nan  # Rounding makes it negative.
        return Estimate(middle, middle - around, middle + around)


def least_squares(
    columns: Sequence[Any], values: ArrayLike, errors: ArrayLike | None = None, confidence: float = CONFIDENCE
) -> LeastSquares:
    """Fit values as sums of columns.

    Args:
        columns: one for each coefficient, as long as `values`.
        values: what is fitted.
        errors: standard deviation of the noise in each value, or in all; None: the residuals tell it, alike in all.
        confidence: of the intervals.

    Raises:
        Unidentified: fewer values than coefficients, or columns that are not independent.
    """
    matrix, target = np.stack(np.broadcast_arrays(*columns), axis=1).astype(float), np.asarray(values, float)
    sigma = np.broadcast_to(1.0 if errors is None else np.asarray(errors, float), target.shape)
    if (sigma <= 0).any():
        raise Unidentified("a value without any noise is given a weight of infinity")
    count, size = matrix.shape
    scaled = matrix / sigma[:, None]
    if count < size or np.linalg.matrix_rank(scaled) < size:
        raise Unidentified(f"{size} coefficients need as many values that are apart, not {count}")
    coefficients = np.linalg.lstsq(scaled, target / sigma, rcond=None)[0]
    unscaled = np.linalg.inv(scaled.T @ scaled)
    if errors is not None:
        return LeastSquares(coefficients, unscaled, float(ndtri((1 + confidence) / 2)))
    free = count - size
    residual = float(np.sum((target - matrix @ coefficients) ** 2))
    reach = float(stdtrit(free, (1 + confidence) / 2)) if free else nan
    return LeastSquares(coefficients, unscaled * (residual / free if free else nan), reach)
