"""The telescoping sweep: a full grid at the smallest width, and at each doubling a smaller one of half the spacing.

Essential AI, Practical Efficiency of Muon for Pretraining (arXiv 2505.02222), algorithm 1: where a rule of widths
transfers, the best hyper-parameters drift by the order of 1 / width, so that each doubling halves what is left of it
and half the spacing finds it. A run costs four times as much there, so there are a quarter as many.

Pure: which points a sweep needs follows from the losses that there are. Points are counted exactly, in spacings of the
first grid from its first value, so that names of trials are the same whenever they are asked for.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product

from jobs.study.fits.estimate import Unidentified
from jobs.study.fits.minimum import minimum

At = tuple[Fraction, ...]
"""A point: on each axis, spacings of the first grid from its first value."""
Losses = Callable[[str, At], float | None]
"""The loss of a width at a point: None where it is not known yet, infinite where training failed."""
STEADY = 1e-3
"""Relative difference of two ratios that are taken for one."""


@dataclass(frozen=True)
class Axis:
    """A hyper-parameter that is tuned, on a logarithmic scale."""

    key: str
    """Of a config."""
    first: float
    ratio: float
    """Between neighbours of the first grid."""
    points: int
    """Of it."""

    @staticmethod
    def of(key: str, values: Sequence[float]) -> "Axis":
        """Return the axis of values in a constant ratio.

        Raises:
            ValueError: they are not.
        """
        if len(values) < 3 or min(values) <= 0:
            raise ValueError(f"must be three positive values or more, not {list(values)}")
        ratio = (values[-1] / values[0]) ** (1 / (len(values) - 1))
        steady = all(abs(b / a / ratio - 1) < STEADY for a, b in pairwise(values))
        if ratio <= 1 or not steady:
            raise ValueError(f"must be values that grow by one ratio, such as 0.01, 0.02, 0.04, not {list(values)}")
        return Axis(key, float(values[0]), ratio, len(values))

    def value(self, at: Fraction) -> float:
        """Return the value at a place, with the digits that a trial's name has."""
        return float(f"{self.first * self.ratio ** float(at):.6g}")

    def place(self, value: float) -> float:
        """Return where a value is."""
        return math.log(value / self.first) / math.log(self.ratio)


@dataclass(frozen=True)
class Level:
    """What was asked for at one width, and what came of it."""

    width: str
    """Label of its point."""
    spacing: Fraction
    """In spacings of the first grid."""
    asked: tuple[At, ...]
    losses: Mapping[At, float]
    """Of those that are known."""
    extended: bool
    """The least loss was at the border of the grid, so that one around it was asked for, too; that happens once."""
    border: bool = False
    """It is at the border of all that was asked for then: the optimum may lie beyond."""
    centre: At | None = None
    """The optimum, by a parabola along each axis, on the next level's lattice; None: not known yet, or all failed."""

    @property
    def complete(self) -> bool:
        """Tell whether all that was asked for is known."""
        return len(self.losses) == len(self.asked)

    @property
    def best(self) -> At | None:
        """The point of the least loss; None where none is finite."""
        return min(self.losses, key=lambda at: (self.losses[at], at)) if self._found else None

    @property
    def spread(self) -> float | None:
        """The largest finite loss less the least one."""
        return max(self._found) - min(self._found) if self._found else None

    @property
    def _found(self) -> list[float]:
        return [loss for loss in self.losses.values() if math.isfinite(loss)]


def telescope(
    axes: Sequence[Axis], widths: Sequence[str], losses: Losses, least: int, allowed: Callable[[At], bool]
) -> list[Level]:
    """Return the levels as far as they are known: the last one is not complete, or is that of the largest width.

    Args:
        axes: that are tuned.
        widths: labels, from the smallest on, each twice as wide as the one before.
        losses: that there are.
        least: points on each axis at every width; with 1 as in the paper the largest width may have a single run.
        allowed: tells of a point whether it can be trained.
    """
    levels: list[Level] = []
    exact = [float(axis.points) for axis in axes]
    for number, width in enumerate(widths):
        if number == 0:
            level = first_level(axes, width, losses, allowed)
        else:
            exact = [max(1.0, round(points * 4 ** (-1 / len(axes)))) for points in exact]
            counts = [max(least, int(points) | 1) for points in exact]  # Odd, so that the centre is one: 8, 5, 3, 1.
            centre = levels[-1].centre
            assert centre is not None
            spacing = Fraction(1, 2**number)
            level = _level(axes, width, losses, _around(centre, counts, spacing), counts, spacing, allowed)
        levels.append(level)
        if level.centre is None:
            break
    return levels


def first_level(axes: Sequence[Axis], width: str, losses: Losses, allowed: Callable[[At], bool]) -> Level:
    """Return the full grid at a width."""
    counts = [axis.points for axis in axes]
    grid = [tuple(map(Fraction, at)) for at in product(*map(range, counts))]
    return _level(axes, width, losses, grid, counts, Fraction(1), allowed)


def _level(
    axes: Sequence[Axis],
    width: str,
    losses: Losses,
    grid: Iterable[At],
    counts: Sequence[int],
    spacing: Fraction,
    allowed: Callable[[At], bool],
) -> Level:
    asked = tuple(filter(allowed, grid))
    level = Level(width, spacing, asked, _known(losses, width, asked), extended=False)
    if not level.complete or level.best is None:
        return level
    if extended := _at_border(level, counts):
        asked = tuple(dict.fromkeys((*asked, *filter(allowed, _around(level.best, counts, spacing)))))
        level = Level(width, spacing, asked, _known(losses, width, asked), extended=True)
        if not level.complete:
            return level
    border = _at_border(level, counts)
    centre = _centre(axes, level)
    return Level(width, spacing, asked, level.losses, extended, border, centre)


def _known(losses: Losses, width: str, asked: Sequence[At]) -> dict[At, float]:
    return {at: loss for at in asked if (loss := losses(width, at)) is not None}


def _around(centre: At, counts: Sequence[int], spacing: Fraction) -> Iterator[At]:
    """Yield a grid around a point."""
    sides = [
        [place + spacing * (number - count // 2) for number in range(count)]
        for place, count in zip(centre, counts, strict=True)
    ]
    return product(*sides)


def _at_border(level: Level, counts: Sequence[int]) -> bool:
    """Tell whether the best point has no neighbour on one side of an axis that has several points."""
    best = level.best
    assert best is not None
    for axis, count in enumerate(counts):
        places = {at[axis] for at in level.asked}
        if count > 1 and best[axis] in (min(places), max(places)):
            return True
    return False


def _centre(axes: Sequence[Axis], level: Level) -> At:
    """Return the optimum on the lattice of half the spacing: along each axis a parabola through the best point."""
    best, half = level.best, level.spacing / 2
    assert best is not None
    centre = []
    for number, axis in enumerate(axes):
        line = sorted(at for at in level.losses if at[:number] + at[number + 1 :] == best[:number] + best[number + 1 :])
        near = [at for at in line if abs(at[number] - best[number]) <= 2 * level.spacing]
        place = float(best[number])
        try:
            found = minimum([axis.value(at[number]) for at in near], [level.losses[at] for at in near], nearest=3)
        except Unidentified:
            pass
        else:  # Not further than to a neighbour: beyond the points that there are a parabola says little.
            place = min(max(axis.place(found.at.value), place - float(level.spacing)), place + float(level.spacing))
            place = min(max(place, float(near[0][number])), float(near[-1][number]))
        centre.append(round(place / float(half)) * half)
    return tuple(centre)
