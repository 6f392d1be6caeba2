"""The combinations of a study's axes: their settings, their trials, and what those have come to."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jobs.study.question import Outcome, Series, Settings, Study, Trial, points, trial_name
from workers.common.errors import ConfigError

BINS = 60
"""Of a run's training losses in a plot; each is the mean of its steps."""


@dataclass(frozen=True)
class Combination:
    """A point of each axis."""

    coordinates: Mapping[str, str]
    """Axis to label."""
    settings: Settings

    @property
    def label(self) -> str:
        """What people call it: the labels, or `all` in a study without axes."""
        return ", ".join(self.coordinates.values()) or "all"

    def trial(self, seed: int, settings: Settings | None = None) -> Trial:
        """Return the trial with a seed, and with further settings, which are coordinates, too."""
        own = dict(settings or {})
        coordinates = {**self.coordinates, **own, "seed": seed}
        return Trial(
            name=trial_name(**coordinates), settings={**self.settings, **own}, coordinates=coordinates, seed=seed
        )


def combinations(study: Study) -> list[Combination]:
    """Return all combinations, that of the first points first; later axes' settings lie over earlier ones'."""
    axes = {name: points(axis, name) for name, axis in study.axes.items()}
    found = []
    for labels in itertools.product(*axes.values()):
        chosen = dict(zip(axes, labels, strict=True))
        settings: dict = {}
        for axis, label in chosen.items():
            settings |= axes[axis][label]
        found.append(Combination(chosen, settings))
    return found


def check_axes(study: Study) -> None:
    """Refuse axes whose names the trials need for themselves, and those without a point.

    Raises:
        ConfigError: with the axis.
    """
    for name, axis in study.axes.items():
        if name == "seed":
            raise ConfigError(f"study {study.name}: axes.seed: seeds are no axis; write them as seeds: [0, 1, 2]")
        if not isinstance(axis, dict | list | tuple) or not axis:
            known = "a list of values, or named points, each with settings"
            raise ConfigError(f"study {study.name}: axes.{name}: must be {known}, not {axis!r}")
        for label, settings in points(axis, name).items():
            if not isinstance(settings, Mapping):
                text = f"must be settings, such as {{optim.lr: 1e-2}} or {{}}, not {settings!r}"
                raise ConfigError(f"study {study.name}: axes.{name}.{label}: {text}")


def usable(outcome: Outcome) -> bool:
    """Tell whether a trial has come to a loss."""
    return outcome.status == "finished" and outcome.val_loss is not None and math.isfinite(outcome.val_loss)


def final_loss(outcome: Outcome) -> float:
    """Return the loss that a trial has come to; infinite where it has come to none."""
    return outcome.val_loss if usable(outcome) and outcome.val_loss is not None else math.inf


def mean_series(series: Iterable[Series]) -> Iterator[tuple[int, list[float]]]:
    """Yield the steps that all of these series have, each with its finite values."""
    known = [dict(one) for one in series]
    common = set.intersection(*(set(one) for one in known)) if known else set()
    for step in sorted(common):
        values = [one[step] for one in known]
        if all(map(math.isfinite, values)):
            yield step, values


def binned(losses: Series, bins: int = BINS) -> list[tuple[int, float]]:
    """Return means over stretches of equally many steps, each at the last of its steps."""
    length = max(1, -(-len(losses) // bins))
    stretches = [losses[begin : begin + length] for begin in range(0, len(losses), length)]
    return [(one[-1][0], sum(loss for _, loss in one) / len(one)) for one in stretches]


def mean_cost(outcomes: Sequence[Outcome], name: str) -> float | None:
    """Return the mean of a cost over trials; None where there are none."""
    return sum(getattr(outcome, name) for outcome in outcomes) / len(outcomes) if outcomes else None
