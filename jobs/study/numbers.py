"""Numbers for people: with the digits that their interval warrants."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from jobs.study.fits.estimate import CONFIDENCE, Estimate

LEAST_VALUES = 3
"""Of an interval: two lie apart by chance as far as they like."""
DIGITS = 4
"""Of a number whose interval nobody knows."""


def mean_of(values: Sequence[float], parts: int = 1) -> Estimate:
    """Return the mean of independent values with Student's interval.

    Args:
        values: one or more.
        parts: so many intervals are to hold at once, with CONFIDENCE together (Bonferroni).
    """
    mean = statistics.fmean(values)
    if len(values) < LEAST_VALUES or not all(map(math.isfinite, values)):
        return Estimate(mean, math.nan, math.nan)
    from scipy.stats import t  # Takes half a second to import.

    quantile = float(t.ppf(1 - (1 - CONFIDENCE) / (2 * parts), len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def outside(estimate: Estimate, value: float = 0.0) -> bool:
    """Tell whether there is an interval, and it has not a value in it."""
    return estimate.known and value not in estimate


def text_of(value: Any, sign: str = "") -> str:
    """Return a cell of a table as a person reads it.

    Args:
        value: a text, a number, an estimate, or None for what is not there.
        sign: `+` shows the sign of a positive number, too.
    """
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return number(value, sign)
        case Estimate():
            return _with_interval(value, sign)
    return str(value)


def plain(value: Any) -> Any:
    """Return a value in JSON's kinds: dataclasses as dicts, tuples as lists, numbers of numpy's as Python's."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | range):
        return [plain(one) for one in value]
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def number(value: float, sign: str = "") -> str:
    """Return a number whose interval nobody knows: four digits, whole numbers whole; NaN and infinity as such."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:{sign},}"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:{sign}.{DIGITS - 1}e}"
    return f"{value:{sign},.{max(0, DIGITS - 1 - (math.floor(math.log10(abs(value))) if value else 0))}f}"


def _with_interval(estimate: Estimate, sign: str) -> str:
    low, high = estimate.low, estimate.high
    if not estimate.known:
        return f"{number(estimate.value, sign)} (no interval)"
    reaches = [abs(end - estimate.value) for end in (low, high) if math.isfinite(end) and end != estimate.value]
    if not reaches:
        return f"{number(estimate.value, sign)} ({number(low, sign)} to {number(high, sign)})"
    # Two digits of how far the interval reaches, to its nearer end: that of a ratio may be a thousand times as far up.
    places = 1 - math.floor(math.log10(min(reaches)))
    value, low, high = (_rounded(one, places, sign) for one in (estimate.value, low, high))
    return f"{value} ({low} to {high})"


def _rounded(value: float, places: int, sign: str) -> str:
    if not math.isfinite(value):
        return f"{value:{sign}}"
    rounded = round(value, places) + 0.0  # Without a minus before 0.
    if value and not rounded:
        return f"{value:{sign}.2g}"
    if rounded and not 1e-4 <= abs(rounded) < 1e6:
        return f"{rounded:{sign}.{max(0, math.floor(math.log10(abs(rounded))) + places)}e}"
    return f"{rounded:{sign},.{max(0, places)}f}" if rounded else f"{0:{sign}}"
