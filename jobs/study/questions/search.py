"""The best settings within ranges: the same number of trials for each combination of the axes, by Optuna or on a grid.

The least of many losses is low by luck, too. So each combination's best settings are trained once more with the seeds
that the search has not seen (all of the study's but the first), and only these runs say which combination is better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.study.combinations import Combination, binned, check_axes, combinations
from jobs.study.configs import config_of
from jobs.study.fits.estimate import Estimate
from jobs.study.numbers import LEAST_VALUES, mean_of, outside, text_of
from jobs.study.question import Answer, Curve, Outcome, Plot, Settings, Study, Table, Trial
from jobs.study.ranges import Range, read_ranges
from jobs.study.report.published import both_optimizers, speedups
from jobs.study.searching import Plan, Searched, optuna_here
from workers.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Search:
    """The best settings within ranges."""

    name: Literal["search"] = "search"
    """Question."""
    ranges: dict[str, Any] = field(default_factory=dict)
    """By key of a config: `{low, high, log}`, or a list of values; whole ends are of whole numbers."""
    ranges_by_point: dict[str, Any] = field(default_factory=dict)
    """Further ranges, or others, of the combinations that have this point of an axis."""
    trials_each: int = 24
    """Of each combination of the axes, the repetitions with other seeds not counted; a grid has what it has."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """`tpe`: Optuna's, which learns from the outcomes; `random`; `grid`: every combination of the values."""
    at_once: int = 2
    """Trials that are suggested together, without knowing of each other's loss."""
    sampler_seed: int = 0
    """Of the suggestions."""

    def check(self, study: Study) -> None:
        """See the protocol.

        Raises:
            ConfigError: a range cannot be searched, or Optuna is wanted and not installed.
        """
        check_axes(study)
        for key, value, least in (("trials_each", self.trials_each, 1), ("at_once", self.at_once, 1)):
            if value < least:
                raise ConfigError(f"study {study.name}: question.{key} must be {least} or more, not {value}")
        known = {label for one in combinations(study) for label in one.coordinates.values()}
        if unknown := sorted(self.ranges_by_point.keys() - known):
            raise ConfigError(
                f"study {study.name}: question.ranges_by_point.{unknown[0]}: no axis has a point of this name; there "
                f"are {', '.join(sorted(known)) or 'no axes'}"
            )
        for one in combinations(study):
            self._check_ranges(study, one)
        if self.sampler != "grid":
            optuna_here()

    def _check_ranges(self, study: Study, combination: Combination) -> None:
        ranges = self.ranges_of(study, combination)
        where = f"study {study.name}: question.ranges"
        if not ranges:
            raise ConfigError(f"{where}: there is nothing to search for {combination.label}; name keys with ranges")
        for one in ranges:
            if one.key in combination.settings:
                raise ConfigError(f"{where}.{one.key}: the point {combination.label} of axes sets it, too")
            if self.sampler == "grid" and not (one.values or one.points):
                raise ConfigError(f"{where}.{one.key}: a grid needs points: N, or a list of values")
        lowest = {one.key: one.grid()[0] if one.values else one.low for one in ranges}
        for one in ranges:
            for value in one.values or (one.low, one.high):
                _check_value(study, {**combination.settings, **lowest, one.key: value}, f"{where}.{one.key}: {value}")

    def ranges_of(self, study: Study, combination: Combination) -> list[Range]:
        """Return what is searched for a combination."""
        where = f"study {study.name}: question.ranges"
        found = {one.key: one for one in read_ranges(self.ranges, where)}
        for label in combination.coordinates.values():
            own = read_ranges(self.ranges_by_point.get(label, {}), f"{where}_by_point.{label}")
            found |= {one.key: one for one in own}
        return [found[key] for key in sorted(found)]

    def trials(self, study: Study, done: Mapping[str, Outcome]) -> Sequence[Trial]:
        """Return the generations that are known, and the best of each finished search with the other seeds."""
        found = [trial for one in self.searches(study, done) for trial in one.trials]
        return list({trial.name: trial for trial in found}.values())

    def searches(self, study: Study, done: Mapping[str, Outcome]) -> list[Searched]:
        """Return how far the search of each combination has come."""
        return [Searched(self._plan(study, one), one, study.seeds, done) for one in combinations(study)]

    def _plan(self, study: Study, combination: Combination) -> Plan:
        return Plan(
            ranges=self.ranges_of(study, combination),
            sampler=self.sampler,
            trials=self.trials_each,
            at_once=self.at_once,
            seed=self.sampler_seed,
        )

    def answer(self, study: Study, done: Mapping[str, Outcome]) -> Answer:
        """Return the best of each combination, and how they compare."""
        searches = self.searches(study, done)
        first, *others = searches
        compared = [(one, _difference(one, first, len(others))) for one in others]
        best = _overall(first, compared)
        context = [speedups()] if both_optimizers(one.combination.settings for one in searches) else []
        return Answer(
            headline=_headline(study, first, compared),
            facts={one.label: one.fact() for one in searches},
            tables=[_bests(study, first, compared), *context],
            plots=_plots(searches),
            notes=_notes(self, study, searches),
            settings=best.settings() if best else {},
        )


def _check_value(study: Study, settings: Settings, what: str) -> None:
    """Refuse what every trial would fail with; where ranges limit one another some may all the same."""
    try:
        config_of(study, settings)
    except ConfigError as error:
        raise ConfigError(f"{what} cannot be tried: {error}") from error


def _difference(one: Searched, first: Searched, number: int) -> Estimate | None:
    """Return by how much a combination's best lies above the first's, over the seeds that no choice has seen."""
    seeds = sorted(one.repeated.keys() & first.repeated.keys())
    return mean_of([one.repeated[seed] - first.repeated[seed] for seed in seeds], number) if seeds else None


Differences = Sequence[tuple[Searched, Estimate | None]]


def _overall(first: Searched, compared: Differences) -> Searched | None:
    """Return the combination whose settings are to be used; None where noise does not tell which one."""
    if not (first.complete and all(one.complete for one, _ in compared)):
        return None
    known = [(one, difference) for one, difference in compared if difference and outside(difference)]
    if better := [(difference.value, one) for one, difference in known if difference.value < 0]:
        return min(better, key=lambda one: one[0])[1]
    return first if len(known) == len(compared) else None


def _headline(study: Study, first: Searched, compared: Differences) -> str:
    searches = [first, *(one for one, _ in compared)]
    if waiting := [one.label for one in searches if not one.complete]:
        return f"Not finished: the search of {', '.join(waiting)} goes on"
    if nothing := [one.label for one in searches if one.best is None]:
        return f"No trial of {', '.join(nothing)} came to a loss"
    if not compared:
        edge = "; at an end of its range, so the best may lie outside" if first.at_the_edge else ""
        return f"Best of {len(first.known)} trials: {_named(first)}, {_repeated(first)}{edge}"
    known = [(one, difference) for one, difference in compared if difference is not None]
    if not any(math.isfinite(difference.low) for _, difference in known):
        return (
            f"No interval: a comparison needs {LEAST_VALUES} seeds or more besides the search's, "
            f"and {max(0, len(study.seeds) - 1)} are there"
        )
    found = [(one, difference) for one, difference in known if outside(difference)]
    seeds = f"{len(first.repeated)} seeds that no choice has seen"
    if not found:
        return f"Within the noise: {', '.join(one.label for one in searches)}, each at its best ({seeds})"
    told = "; ".join(f"{one.label} {text_of(difference, '+')}" for one, difference in found)
    rest = len(compared) - len(found)
    noise = f"; the other {rest} within the noise" if rest else ""
    edge = "; a best lies at an end of its range" if any(one.at_the_edge for one in searches) else ""
    return f"Each at its best, loss against {first.label}, nats per token: {told}{noise} ({seeds}){edge}"


def _named(one: Searched) -> str:
    assert one.best is not None
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in one.best[0].items()
    )


def _repeated(one: Searched) -> str:
    if one.repeated:
        mean = mean_of(list(one.repeated.values()))
        return f"validation loss {text_of(mean)} with {len(one.repeated)} other seed(s)"
    assert one.best is not None
    return f"validation loss {one.best[1]:.4f}, of one seed"


def _bests(study: Study, first: Searched, compared: Differences) -> Table:
    rows = []
    for one, difference in [(first, None), *compared]:
        again = text_of(mean_of(list(one.repeated.values()))) if one.repeated else None
        found = [_named(one), f"{one.best[1]:.4f}"] if one.best else [None, None]
        edge = ", ".join(range_.key for range_ in one.at_the_edge) or "no"
        told = "the first" if one is first else None if difference is None else text_of(difference, "+")
        rows.append([one.label, len(one.known), one.failed, *found, edge, again, told])
    return Table(
        title="The best of each search",
        columns=["search", "trials", "failed", "best", "its loss", "at an end", "with other seeds", "difference"],
        rows=rows,
        note=f"Nats per token. The search has seed {study.seeds[0]}; its least loss is low by luck, too, so "
        "differences are of the other seeds alone, paired, with 95 % for all of them together.",
    )


def _plots(searches: Sequence[Searched]) -> list[Plot]:
    keys = dict.fromkeys(one.key for search in searches for one in search.ranges if one.ends)
    plots = []
    for key in keys:
        of_key = [(search, one) for search in searches for one in search.ranges if one.key == key and one.ends]
        curves = [_points(search, key) for search, _ in of_key]
        log = any(one.log or (bool(one.values) and min(one.values) > 0) for _, one in of_key)
        name = "loss-" + key.replace(".", "-")
        plots.append(
            Plot(name=name, title=f"Loss over {key}", x=key, y="validation loss (nats)", curves=curves, log_x=log)
        )
    bests = [_training(search) for search in searches]
    plots.append(
        Plot(
            name="losses",
            title="Training loss of the best",
            x="step",
            y="loss (nats per token)",
            curves=[one for one in bests if one],
            note="Of the search's seed.",
        )
    )
    return [one for one in plots if any(curve.x for curve in one.curves)]


def _points(search: Searched, key: str) -> Curve:
    known = sorted((settings[key], loss) for settings, loss in search.known)
    alone = len(search.ranges) == 1
    x, y = [value for value, _ in known], [loss for _, loss in known]
    return Curve(label=search.label, x=x, y=y, kind="both" if alone else "points")


def _training(search: Searched) -> Curve | None:
    if search.best is None:
        return None
    losses = binned(search.done[search.combination.trial(search.seed, search.best[0]).name].losses)
    label = f"{search.label}, {_named(search)}"
    return Curve(label=label, x=[step for step, _ in losses], y=[loss for _, loss in losses], kind="line")


def _notes(question: Search, study: Study, searches: Sequence[Searched]) -> list[str]:
    how = {"tpe": "Optuna's TPE", "random": "random values", "grid": "a grid"}[question.sampler]
    notes = [
        f"{one.label}: {', '.join(range_.key for range_ in one.ranges)} tuned by {how} in "
        f"{len(one.known) + one.failed} trials, {one.failed} of which came to no loss."
        for one in searches
    ]
    if len({len(one.asked) for one in searches}) > 1:
        notes.append("The searches had different numbers of trials: the one with more is favoured.")
    notes += [
        f"{one.label}: the best {range_.key} is at an end of what was tried; a better one may lie outside."
        for one in searches
        for range_ in one.at_the_edge
    ]
    notes += [
        f"{one.label}: the best failed with {lost} of {len(one.repeats)} other seed(s), which are in no mean."
        for one in searches
        if (lost := len(one.repeats) - len(one.repeated)) and one.complete
    ]
    if len(study.seeds) < 1 + LEAST_VALUES:
        notes.append(f"With fewer than {LEAST_VALUES} seeds besides the search's there are no intervals.")
    return notes
