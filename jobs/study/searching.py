"""The search of one combination, as far as its outcomes have come: a pure function of them.

Suggestions come in generations of `at_once` trials from a seeded sampler, which is told the outcomes of all earlier
generations in the order in which they were suggested; so the same outcomes give the same suggestions, whoever finished
first and however often the study was killed.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jobs.study.combinations import Combination, final_loss, usable
from jobs.study.numbers import LEAST_VALUES
from jobs.study.question import Outcome, Setting, Settings, Trial
from jobs.study.ranges import Range, combinations_of
from workers.common.errors import ConfigError

NOISE = 2.0
"""Standard deviations over the seeds within which settings count as equally good."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a search is done."""

    ranges: Sequence[Range]
    """Sorted by key."""
    sampler: Literal["tpe", "random", "grid"]
    trials: int
    """So many, but of a grid, which has what it has."""
    at_once: int
    """Suggested together, without knowing of each other's loss."""
    seed: int
    """Of the suggestions."""


class Searched:
    """How far the search of one combination has come."""

    def __init__(self, plan: Plan, combination: Combination, seeds: Sequence[int], done: Mapping[str, Outcome]) -> None:
        self.combination, self.label, self.done, self.ranges = combination, combination.label, done, plan.ranges
        self.seed, *self.others = seeds
        suggested = list(combinations_of(plan.ranges)) if plan.sampler == "grid" else _sampled(plan, self._loss)
        self.asked = list({one.name: one for one in map(self._trial, suggested)}.values())
        self.finished = all(one.name in done for one in self.asked)
        """Whether all that is asked for has been tried, so that no more will be suggested."""

    def _trial(self, settings: Settings) -> Trial:
        return self.combination.trial(self.seed, settings)

    def _loss(self, settings: Settings) -> float | None:
        """Return what settings came to, infinity where they failed; None where they are not done."""
        outcome = self.done.get(self._trial(settings).name)
        return None if outcome is None else final_loss(outcome)  # Infinite: a sampler takes it for very bad.

    @property
    def complete(self) -> bool:
        """Whether the best has been trained once more with all seeds, too."""
        return self.finished and all(one.name in self.done for one in self.repeats)

    @property
    def known(self) -> list[tuple[Settings, float]]:
        """What was searched of each trial that came to a loss, and the loss."""
        keys = [one.key for one in self.ranges]
        found = [(trial, self.done[trial.name]) for trial in self.asked if trial.name in self.done]
        return [({key: trial.settings[key] for key in keys}, final_loss(one)) for trial, one in found if usable(one)]

    @property
    def failed(self) -> int:
        """How many trials came to no loss."""
        return sum(one.name in self.done for one in self.asked) - len(self.known)

    @cached_property
    def best(self) -> tuple[Settings, float] | None:
        """The settings with the least loss, and it; of equal ones those that were suggested first."""
        return min(self.known, key=lambda one: one[1], default=None)

    @property
    def repeats(self) -> list[Trial]:
        """The best settings with the seeds that the search has not seen."""
        return [self.combination.trial(seed, self.best[0]) for seed in self.others if self.best]

    @property
    def trials(self) -> list[Trial]:
        """All that are known to be needed."""
        return [*self.asked, *(self.repeats if self.finished else [])]

    @property
    def repeated(self) -> dict[int, float]:
        """The loss of the best settings by seed, where it was trained once more."""
        found = {one.seed: self.done[one.name] for one in self.repeats if one.name in self.done}
        return {seed: final_loss(one) for seed, one in found.items() if usable(one)} if self.finished else {}

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the loss over seeds, the search's not among them, which was chosen for its loss."""
        losses = list(self.repeated.values())
        return statistics.stdev(losses) if len(losses) >= LEAST_VALUES else None

    @property
    def at_the_edge(self) -> list[Range]:
        """Ranges at whose end the best lies: it may be outside."""
        if self.best is None:
            return []
        return [one for one in self.ranges if one.at_an_end(self.best[0][one.key])]

    def alike(self, key: str) -> tuple[float, float] | None:
        """Return the least and the greatest value tried with a loss that noise does not tell from the best."""
        range_ = next(one for one in self.ranges if one.key == key)
        if self.best is None or self.deviation is None or range_.ends is None:
            return None
        limit = self.best[1] + NOISE * self.deviation
        values = [settings[key] for settings, loss in self.known if loss <= limit]
        return min(values), max(values)

    def settings(self) -> dict[str, Setting]:
        """Return what was found, with what belongs to the combination."""
        if self.best is None:
            return {}
        chosen = f"{self.label}: " if self.combination.settings else ""
        why = f"{chosen}the least validation loss of {len(self.known)} trials, {self.best[1]:.4f} nats per token"
        fixed = {
            key: Setting(value=value, why=f"point of {self.label}") for key, value in self.combination.settings.items()
        }
        return fixed | {key: self._setting(key, why) for key in self.best[0]}

    def _setting(self, key: str, why: str) -> Setting:
        assert self.best is not None
        interval = self.alike(key)
        if interval is None:
            return Setting(value=self.best[0][key], why=why)
        noise = f"; between low and high within {NOISE:g} standard deviations of the seeds"
        return Setting(value=self.best[0][key], low=interval[0], high=interval[1], why=why + noise)

    def fact(self) -> dict[str, Any]:
        """Return what goes into the JSON."""
        return {
            "trials": [{"settings": settings, "val_loss": loss} for settings, loss in self.known],
            "failed": self.failed,
            "finished": self.finished,
            "best": self.best and {"settings": self.best[0], "val_loss": self.best[1]},
            "repeated": {str(seed): loss for seed, loss in self.repeated.items()},
            "at_the_edge": [one.key for one in self.at_the_edge],
        }


def _sampled(plan: Plan, loss: Callable[[Settings], float | None]) -> list[Settings]:
    """Return all suggestions up to the first generation that is not done."""
    optuna = optuna_here()
    kinds = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    told = optuna.create_study(sampler=kinds[plan.sampler](seed=plan.seed))
    space, suggested = {one.key: _distribution(optuna, one) for one in plan.ranges}, list[Settings]()
    while len(suggested) < plan.trials:
        number = min(plan.at_once, plan.trials - len(suggested))
        asked = [told.ask(space) for _ in range(number)]
        settings = [{one.key: one.tried(trial.params[one.key]) for one in plan.ranges} for trial in asked]
        suggested += settings
        losses = [loss(one) for one in settings]
        if None in losses:
            break
        for trial, value in zip(asked, losses, strict=True):
            told.tell(trial, value)
    return suggested


def _distribution(optuna: Any, one: Range) -> Any:
    if one.values:
        return optuna.distributions.CategoricalDistribution(one.values)
    kind = optuna.distributions.IntDistribution if one.whole else optuna.distributions.FloatDistribution
    return kind(one.low, one.high, log=one.log)


def optuna_here() -> Any:
    """Import Optuna.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "question.sampler: a search needs Optuna, which is not installed; install raymuon[studies], or take "
            "sampler: grid, which does without"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
