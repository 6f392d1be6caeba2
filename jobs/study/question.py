"""What a study asks, what trials it needs for that, and what it answers: the words that all of `jobs.study` shares.

A question is pure: from the outcomes that there are it says which trials it needs (more of them as outcomes come in, a
sweep that narrows for instance), and in the end what they come to. So a study that was killed asks again, gets the same
names, and repeats nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal, Protocol

from jobs.study.fits.estimate import Estimate

Settings = Mapping[str, Any]
"""Keys of a config (`optim.lr`) and their values."""
Series = Sequence[tuple[int, float]]
"""`(step, nats per token)`."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Where a trial begins: with all that another has after a step. It goes on at the next one."""

    trial: str
    """Of this study."""
    step: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A run of a study."""

    name: str
    """Unique in the study, the same whenever it is asked for: see `trial_name`."""
    settings: Settings
    """Over those of the study."""
    coordinates: Mapping[str, str | float]
    """Where it is on each axis, for tables and analyses; the seed and the study's own things are among them."""
    seed: int = 0
    branch: Branch | None = None
    stop_at: int = 0
    """The step after which the trial ends, though its schedule goes on; 0: the last."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial has come to, all of it read from MLflow."""

    trial: str
    run_id: str
    status: Literal["finished", "failed"]
    """`failed`: it would fail again, for instance as its loss was not finite; it is not repeated."""
    error: str = ""
    coordinates: Mapping[str, str | float] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    """Trained on, those of the trial that it branched from included."""
    val_loss: float | None = None
    """At the end, nats per token; None where it failed."""
    losses: Series = ()
    """Of the training."""
    validation: Series = ()
    parameters: int = 0
    """All but embedding and head."""
    flops: float = 0.0
    """Of the model, forward and backward, for all tokens."""
    optimizer_flops: float = 0.0
    """Of the optimizer, for all steps."""
    seconds: float = 0.0
    """Spent in steps that count."""
    noise_scale: float | None = None
    """The gradient's, in tokens, the last that was logged; None without telemetry, or where noise hides it."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Texts, numbers and estimates (`fits.estimate`), which the report rounds as they warrant; None for nothing."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One of what a plot shows."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """Of an interval; as many as there are points, or none."""
    high: Sequence[float] = ()
    kind: Literal["line", "points", "both"] = "both"
    context: bool = False
    """Published by others, not measured here: drawn apart and labelled so."""

    @classmethod
    def of(cls, label: str, x: Sequence[float], y: Sequence[Estimate], bounded: bool = True, **more: Any) -> "Curve":
        """Return the curve of estimates, with their intervals where these are bounded."""
        low, high = ([one.low for one in y], [one.high for one in y]) if bounded else ((), ())
        return cls(label=label, x=x, y=[one.value for one in y], low=low, high=high, **more)


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot of a report."""

    name: str
    """Of its file, without the ending."""
    title: str
    x: str
    """Label, with the unit."""
    y: str
    curves: Sequence[Curve]
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[float] = ()
    """Values of y at which a line is drawn, such as a ratio of 1."""
    names: Sequence[str] = ()
    """Of x at 1, 2 and so on, where it counts things."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A value that a study has found, to be used by the next run."""

    value: Any
    low: float | None = None
    """Of its interval, where it has one."""
    high: float | None = None
    why: str
    """From what it comes, in a few words."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a study has found."""

    headline: str
    """The first line of its report: the finding with its interval, or that it lies within the noise."""
    facts: Mapping[str, Any]
    """For the JSON: plain values."""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    """What was tuned and how often, what was assumed, what could not be told."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """By key of a config."""
    found_at: Settings = field(default_factory=dict)
    """Of the trials that the settings are from, where trials differ in it: the size for instance. A settings file tells
    at which width and with which optimizer a rate was found, and whoever uses it elsewhere is told."""


class Question(Protocol):
    """What a study asks: a frozen dataclass of the study file's section `question`."""

    name: str
    """In YAML."""

    def check(self, study: "Study") -> None:
        """Look at what can be seen before anything runs.

        Raises:
            ConfigError: the study cannot answer it, with the key and how to mend it.
        """

    def trials(self, study: "Study", done: Mapping[str, Outcome]) -> Sequence[Trial]:
        """Return all trials that are known to be needed, those that are done among them, in the order of their start.

        With more outcomes there are more of them, and never others: what was asked for stays asked for. When all that
        it returns are done, the study is finished.
        """
        ...

    def answer(self, study: "Study", done: Mapping[str, Outcome]) -> Answer:
        """Return what the outcomes come to, when all trials are done or as far as they are."""
        ...


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file."""

    name: str
    """Of the parent run; runs of its trials are called NAME/TRIAL."""
    base: str = "demo-llama"
    """Config of all trials: a YAML file or a built-in one."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Over the base, of all trials."""
    axes: dict[str, Any] = field(default_factory=dict)
    """What differs: a key of a config with a list of its values, or a name with named points, each with settings."""
    seeds: tuple[int, ...] = (0,)
    """Of the trials that are repeated with others."""
    early_stop: Literal["none", "diverged"] = "diverged"
    """`diverged`: a trial ends whose loss is not finite, or a tenth above its start after a quarter of its steps."""
    question: Question

    @property
    def base_name(self) -> str:
        """Of the base, for people: without the folder in which it lies."""
        return PurePath(self.base).stem


def points(axis: Any, name: str) -> dict[str, Settings]:
    """Return the points of an axis of a study file by label: of a list the values of the key that the axis names."""
    if isinstance(axis, Mapping):
        return {str(label): settings for label, settings in axis.items()}
    return {_text(value): {name: value} for value in axis}


def trial_name(**coordinates: str | float) -> str:
    """Return the name of the trial at these coordinates: `lr=0.016,optimizer=muon,size=small`."""
    return ",".join(f"{key}={_text(value)}" for key, value in sorted(coordinates.items()))


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
