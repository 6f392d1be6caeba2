"""Ranges of a search in a study file: `{low: 1e-3, high: 1e-1, log: true}`, or a list of values."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.common.errors import ConfigError

DIGITS = 4
"""Of a value that is tried: what a name shows of it is then what it was."""
EDGE = 0.05
"""Share of a range that counts as its end."""
KEYS = ("low", "high", "log", "points")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Values that a key may have."""

    key: str
    values: tuple[Any, ...] = ()
    """These, or else what is between the ends."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    points: int = 0
    """Of a grid."""

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Any, Any] | None:
        """The least and the greatest value; None where values have no order."""
        if not self.values:
            return self.low, self.high
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in self.values)
        return (min(self.values), max(self.values)) if numbers else None

    def at_an_end(self, value: Any) -> bool:
        """Tell whether a value is so near an end of the range that a better one may lie outside."""
        if self.ends is None or self.ends[0] == self.ends[1]:
            return False
        if self.values or self.whole or self.points:
            return value in self.ends
        low, high, at = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return not EDGE < (at - low) / (high - low) < 1 - EDGE

    def grid(self) -> tuple[Any, ...]:
        """Return the values of a grid."""
        if self.values:
            return self.values
        shares = [number / (self.points - 1) for number in range(self.points)]
        if self.log:
            found = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            found = [self.low + (self.high - self.low) * share for share in shares]
        return tuple(dict.fromkeys(map(self.tried, found)))

    def tried(self, value: Any) -> Any:
        """Return what is really tried of a suggestion: with few digits, and within the ends."""
        if self.values:
            return value
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)


def read_ranges(ranges: Any, where: str) -> list[Range]:
    """Read the ranges of a study file, sorted by key.

    Args:
        ranges: what the file has, by key of a config.
        where: of the file, for messages.

    Raises:
        ConfigError: with what is wrong.
    """
    if not isinstance(ranges, Mapping):
        raise ConfigError(f"{where}: must hold keys of a config with their ranges, not {ranges!r}")
    return [_read(str(key), ranges[key], f"{where}.{key}") for key in sorted(ranges, key=str)]


def combinations_of(ranges: Sequence[Range]) -> Iterator[dict[str, Any]]:
    """Yield every point of a grid."""
    for values in itertools.product(*(one.grid() for one in ranges)):
        yield dict(zip((one.key for one in ranges), values, strict=True))


def _read(key: str, found: Any, where: str) -> Range:
    if isinstance(found, list | tuple) and found:
        return Range(key=key, values=tuple(found))
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: must be a list of values or {{low: ..., high: ...}}, not {found!r}")
    if unknown := sorted(set(found) - set(KEYS)):
        raise ConfigError(f"{where}.{unknown[0]}: unknown key; a range has {', '.join(KEYS)}")
    low, high = (_number(found.get(end), f"{where}.{end}") for end in ("low", "high"))
    if not low < high:
        raise ConfigError(f"{where}: low must be less than high, not {low:g} and {high:g}")
    log, points = found.get("log", False), found.get("points", 0)
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log: must be true or false, not {log!r}")
    if log and low <= 0:
        raise ConfigError(f"{where}.low: must be greater than 0 where log is true, not {low:g}")
    if isinstance(points, bool) or not isinstance(points, int) or (points and points < 2):
        raise ConfigError(f"{where}.points: must be a whole number of 2 or more, not {points!r}")
    return Range(key=key, low=low, high=high, log=log, points=points)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: must be a finite number, not {value!r}")
    return value
