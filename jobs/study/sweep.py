"""What was trained under one rule of widths: its sweep and full grids, and the best value of each key at each width."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from jobs.study.combinations import final_loss
from jobs.study.configs import config_of
from jobs.study.fits.drift import Drift, drift
from jobs.study.fits.estimate import Estimate, Unidentified
from jobs.study.fits.minimum import minimum
from jobs.study.question import Outcome, Settings, Study, Trial, points, trial_name
from jobs.study.telescope import At, Axis, Level, first_level, telescope
from optim.config import MOST_DECAY

WIDTH, RULE, RATE, DECAY = "width", "optim.width_rule", "optim.lr", "optim.weight_decay"
HIDDEN, BASE = "model.hidden_size", "optim.base_width"
WINDOW = 1
"""Spacings of the first grid around the best value in which a parabola is fitted: with rates that are too high the loss
rises otherwise than below the optimum, and points further off move the minimum by more than noise does."""


@dataclass(frozen=True)
class Best:
    """The best value of one key at one width."""

    at: Estimate
    loss: float
    """At the best point that was measured."""
    border: bool
    """That point is the last one on a side."""


class Sweep:
    """What was trained under one rule.

    Args:
        study: with the axes of `Transfer`.
        rule: of the widths.
        done: outcomes by name of their trials.
        least: points on each tuned axis at every width.
        full_grids: widths at which the whole first grid is trained, by name.
    """

    def __init__(
        self, study: Study, rule: str, done: Mapping[str, Outcome], least: int, full_grids: Sequence[str] = ()
    ) -> None:
        self.study, self.rule, self.done = study, rule, done
        self.axes = [Axis.of(key, axis) for key, axis in study.axes.items() if key not in (WIDTH, RULE)]
        self.widths: dict[str, Settings] = points(study.axes[WIDTH], WIDTH)
        self.labels = list(self.widths)
        self.sizes = [int(settings[HIDDEN]) for settings in self.widths.values()]
        self.levels = telescope(self.axes, self.labels, self.loss, least, self.allowed)
        self.grids = [first_level(self.axes, label, self.loss, self.allowed) for label in full_grids]

    def values(self, at: At) -> dict[str, float]:
        """Return the settings of a point."""
        return {axis.key: axis.value(place) for axis, place in zip(self.axes, at, strict=True)}

    def allowed(self, at: At) -> bool:
        """Tell whether a config takes a point: a rate of 1 at most, a decay of a tenth of the weights in a step."""
        values = self.values(at)
        decay = values[DECAY] if DECAY in values else config_of(self.study, {}).optim.weight_decay
        return values[RATE] <= 1 and values[RATE] * decay <= MOST_DECAY

    def of(self, width: str, at: At) -> list[Trial]:
        """Return the trials of a point, one for each seed."""
        found = []
        for seed in self.study.seeds:
            coordinates = {WIDTH: width, RULE: self.rule, **self.values(at), "seed": seed}
            settings = {**self.widths[width], RULE: self.rule, BASE: self.sizes[0], **self.values(at)}
            name = trial_name(**coordinates)
            found.append(Trial(name=name, settings=settings, coordinates=coordinates, seed=seed))
        return found

    def outcomes(self, width: str, at: At) -> list[Outcome]:
        """Return what the trials of a point have come to."""
        return [self.done[trial.name] for trial in self.of(width, at) if trial.name in self.done]

    def loss(self, width: str, at: At) -> float | None:
        """Return the mean validation loss of the seeds: infinite where one failed, None where one is not done."""
        outcomes = self.outcomes(width, at)
        if len(outcomes) < len(self.study.seeds):
            return None
        return fmean(final_loss(one) for one in outcomes)

    @property
    def trials(self) -> Iterator[Trial]:
        """All that are known to be needed, from the smallest width on, those of the sweep first."""
        for level in (*self.levels, *self.grids):
            for at in level.asked:
                yield from self.of(level.width, at)

    @property
    def complete(self) -> bool:
        """Tell whether nothing more will be asked for."""
        return len(self.levels) == len(self.labels) and all(level.complete for level in (*self.levels, *self.grids))

    @cached_property
    def bests(self) -> dict[tuple[str, str], Best]:
        """Return the best value by key and width, where one is known."""
        found = {(axis.key, label): self._best(number, label) for label in self.labels for number, axis in self._axes}
        return {place: best for place, best in found.items() if best is not None}

    @property
    def _axes(self) -> Iterable[tuple[int, Axis]]:
        return enumerate(self.axes)

    def measured(self, label: str) -> dict[At, float]:
        """Return the finite mean loss of every point at a width."""
        levels = [level for level in (*self.levels, *self.grids) if level.width == label]
        return {at: loss for level in levels for at, loss in level.losses.items() if math.isfinite(loss)}

    def _best(self, number: int, label: str) -> Best | None:
        """Return the best value along an axis: the minimum of a parabola through what the others' best values leave."""
        losses, axis = self.measured(label), self.axes[number]
        if not losses:
            return None
        least: dict[Any, At] = {}
        for at in sorted(losses, key=lambda at: (losses[at], at)):
            least.setdefault(at[number], at)
        best = min(least.values(), key=lambda at: (losses[at], at))
        near = [at for place, at in sorted(least.items()) if abs(place - best[number]) <= WINDOW]
        runs = [(axis.value(at[number]), final_loss(one)) for at in near for one in self.outcomes(label, at)]
        border = best[number] in (min(least), max(least))
        found = _minimum(runs)
        if found is None or not min(runs)[0] / axis.ratio <= found.value <= max(runs)[0] * axis.ratio:
            found = Estimate(axis.value(best[number]), math.nan, math.nan)
        return Best(found, losses[best], border)

    def over_widths(self, key: str) -> list[tuple[int, Estimate]]:
        """Return the best value at each width at which it is known."""
        places = zip(self.labels, self.sizes, strict=True)
        return [(size, self.bests[key, label].at) for label, size in places if (key, label) in self.bests]

    def moved(self, key: str) -> Estimate | None:
        """Return the best value at the largest width over that at the smallest, with what both intervals allow."""
        first, last = (self.bests.get((key, label)) for label in (self.labels[0], self.labels[-1]))
        if first is None or last is None:
            return None
        a, b = first.at, last.at
        return Estimate(b.value / a.value, b.low / a.high, b.high / a.low if a.low else math.inf)

    def drift(self, key: str) -> Drift | None:
        """Return the fit of the best values over 1 / width; None where there are fewer than three."""
        known = self.over_widths(key)
        return drift([size for size, _ in known], [at.value for _, at in known]) if len(known) > 2 else None

    def cost(self, levels: Iterable[Level]) -> tuple[int, float, float]:
        """Return how many trials of levels are done, and their operations and seconds; each trial counts once."""
        names = {trial.name for level in levels for at in level.asked for trial in self.of(level.width, at)}
        done = [self.done[name] for name in names if name in self.done]
        return len(done), sum(one.flops + one.optimizer_flops for one in done), sum(one.seconds for one in done)


def _minimum(runs: Sequence[tuple[float, float]]) -> Estimate | None:
    try:
        return minimum([value for value, _ in runs], [loss for _, loss in runs]).at
    except Unidentified:
        return None
