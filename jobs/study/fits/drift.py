"""How the best value of a hyper-parameter moves with the width: `ln x*(n) = ln x* - alpha / n`.

Essential AI, Practical Efficiency of Muon for Pretraining (arXiv 2505.02222), equation 4: under a rule of widths that
transfers, what is left of the movement is of the order of one over the width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jobs.study.fits.estimate import CONFIDENCE, Estimate, Unidentified
from jobs.study.fits.linear import LeastSquares, least_squares


@dataclass(frozen=True)
class Drift:
    """The fitted line over `1 / n`."""

    limit: Estimate
    """The best value at infinite width."""
    alpha: Estimate
    """In widths: what `1 / n` is multiplied with to be a change of the logarithm."""
    line: LeastSquares

    def at(self, width: float) -> Estimate:
        """Return the best value at a width, measured or not."""
        return self.line.estimate([1.0, -1 / width]).exp()


def drift(
    widths: Sequence[float],
    best: Sequence[float],
    errors: Sequence[float] | float | None = None,
    confidence: float = CONFIDENCE,
) -> Drift:
    """Fit the drift.

    Args:
        widths: at which the best values were found.
        best: values of the hyper-parameter, positive.
        errors: standard deviation of the logarithm of each, or of all: of a grid of ratio r that is `ln(r) / sqrt(12)`.
            None: the residuals tell it, for which there have to be three widths.
        confidence: of the intervals.

    Raises:
        Unidentified: fewer than two widths.
    """
    if len(set(widths)) < 2:
        raise Unidentified(f"a drift needs the best values at two widths, not at {len(set(widths))}")
    inverse = 1 / np.asarray(widths, float)
    line = least_squares([np.ones_like(inverse), -inverse], np.log(best), errors, confidence)
    return Drift(line.estimate([1.0, 0.0]).exp(), line.estimate([0.0, 1.0]), line)
