"""What a fit finds: a value with its interval, and the refusal where the points do not tell."""

import math
from collections.abc import Callable
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Of all intervals, where nothing else is said."""


class Unidentified(ValueError):
    """The points do not tell what was asked of them; the text says why, and what would."""


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds the truth as often as its confidence says.

    An end that is infinite is one that the points do not bound; both are NaN where nothing tells how much noise there
    is.
    """

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low + self.high)

    def exp(self) -> "Estimate":
        """Return the value whose logarithm this is."""
        return self.through(_exp)

    def through(self, function: Callable[[float], float]) -> "Estimate":
        """Return a monotone function of it."""
        low, high = function(self.low), function(self.high)
        return Estimate(function(self.value), *((high, low) if low > high else (low, high)))


def _exp(logarithm: float) -> float:
    return math.inf if logarithm > 700 else math.exp(logarithm)
