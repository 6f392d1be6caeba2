"""What a run's journal says of its steps, and how a replay of some of them compares with it. Pure functions.

A driver that was lost may have put down steps that its successor trained again: of each step the last row counts, for
the weights that the run went on with came out of that one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.record.events import DriverStarted, Foreign, Membership
from orchestrator.record.journal import Line, Row
from orchestrator.record.provenance import Provenance
from workers.common.errors import ConfigError
from workers.common.typed import read_fields

TOLERANCE = 1e-3
"""Relative difference of a loss, where the world size or the hardware is another one; of a gradient's norm ten times
that. Sums are rounded in another order then, and an expert whose score ties with another's may change its tokens."""
OTHER_PRECISION = 2e-2
"""The same, where one side trains in bf16 and the other in fp32."""
DECIDING = ("model", "optim", "train", "telemetry", "seed")
"""The sections of a config on which losses depend. Telemetry is among them because measuring takes another path
through attention on a CPU."""


@dataclass(frozen=True)
class Attempt:
    """A driver's attempt, as it has introduced itself."""

    number: int
    config: dict[str, Any]
    provenance: Provenance
    corpora: dict[str, str]
    """URL of each source's prepared corpus, by the source's name."""

    def deciding(self) -> dict[str, Any]:
        """Return the part of the config on which losses depend."""
        return {section: self.config.get(section) for section in DECIDING}


@dataclass
class Record:
    """The journal of a run, by step."""

    attempts: dict[int, Attempt] = field(default_factory=dict)
    by: dict[int, int] = field(default_factory=dict)
    """The attempt that trained a step last."""
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Loss, gradient norm, world size and the rest of each step."""
    validations: dict[int, float] = field(default_factory=dict)
    devices: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """On which a step was trained."""
    chosen: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What was automatic in `train` when a step was trained, and what it was."""


def read_record(lines: Iterable[Line]) -> Record:
    """Make a record out of a journal's lines, which are in order."""
    record, attempt, devices = Record(), 0, ()
    chosen: dict[str, Any] = {}
    for line in lines:
        match line:
            case DriverStarted():
                attempt = line.attempt
                if line.config:  # Older journals lack it.
                    provenance = read_fields(Provenance, line.provenance)
                    corpora = line.corpora or {"": line.corpus}
                    record.attempts[attempt] = Attempt(attempt, line.config, provenance, corpora)
            case Foreign(stored={"event": DriverStarted.stored_as}):
                attempt = 0  # What follows was not trained with the config of the attempt before.
            case Membership():
                devices, chosen = line.devices, line.chosen
            case Row(series="train", step=step):
                record.steps[step], record.by[step], record.devices[step] = line.values, attempt, devices
                record.chosen[step] = chosen
            case Row(series="validation", step=step):
                record.validations[step] = line.values["val_loss"]
    return record


def attempt_of(record: Record, first: int, last: int) -> Attempt:
    """Return the attempt whose config holds for all of these steps.

    Raises:
        ConfigError: steps are not on record, or the config changed among them.
    """
    if missing := [step for step in (first, last) if step not in record.steps]:
        known = f"steps {min(record.steps)} to {max(record.steps)} are" if record.steps else "no step is"
        raise ConfigError(
            f"--steps: step {missing[0]} is not on record; {known} (a running run puts its steps down with each "
            "checkpoint)"
        )
    found: Attempt | None = None
    for step in range(first, last + 1):
        if step not in record.steps:
            raise ConfigError(
                f"--steps: step {step} is not on record: its driver was lost before it had put it down; replay the "
                "steps before and after it apart"
            )
        attempt = record.attempts.get(record.by[step])
        if attempt is None:
            raise ConfigError(f"--steps: step {step} was put down by a version that did not record its config")
        if found is not None and attempt.deciding() != found.deciding():
            raise ConfigError(f"--steps: the config changed at step {step}; replay the steps before and after it apart")
        found = attempt
    assert found is not None
    return found


@dataclass(frozen=True)
class Difference:
    """How a metric of one step differs."""

    step: int
    metric: str
    recorded: float
    replayed: float

    @property
    def relative(self) -> float:
        """Relative difference; infinite where only one of the two is a number."""
        if self.equal:
            return 0.0
        difference = abs(self.replayed - self.recorded) / max(abs(self.recorded), 1e-30)
        return difference if math.isfinite(difference) else math.inf

    @property
    def equal(self) -> bool:
        """Whether they are the same float; not-a-number equals itself here."""
        return self.recorded == self.replayed or (math.isnan(self.recorded) and math.isnan(self.replayed))


@dataclass(frozen=True)
class Comparison:
    """A replay beside the record."""

    differences: tuple[Difference, ...]
    """Of every metric of every step, equal ones too, in order."""
    tolerance: float

    @property
    def bitwise_equal(self) -> bool:
        """Whether every number is the same float."""
        return all(difference.equal for difference in self.differences)

    @property
    def first_different(self) -> Difference | None:
        """The first number that is not the same float."""
        return next((difference for difference in self.differences if not difference.equal), None)

    @property
    def first_beyond(self) -> Difference | None:
        """The first number that differs by more than the tolerance."""
        return next((one for one in self.differences if one.relative > self.allowed(one.metric)), None)

    def allowed(self, metric: str) -> float:
        """Return the relative tolerance of a metric: a gradient's norm is noisier than a loss."""
        return self.tolerance * (10 if metric == "grad_norm" else 1)

    def largest(self, metric: str) -> Difference | None:
        """Return the largest difference of a metric; None where it was never compared."""
        return max(
            (one for one in self.differences if one.metric == metric), key=lambda one: one.relative, default=None
        )


def compare(record: Record, replayed: Record, tolerance: float) -> Comparison:
    """Compare what a replay has trained with the record, step by step."""
    differences = []
    for step in sorted(replayed.steps.keys() | replayed.validations.keys()):
        for metric in ("loss", "grad_norm"):
            if step in replayed.steps and step in record.steps:
                pair = record.steps[step][metric], replayed.steps[step][metric]
                differences.append(Difference(step, metric, *pair))
        if step in replayed.validations and step in record.validations:
            differences.append(Difference(step, "val_loss", record.validations[step], replayed.validations[step]))
    return Comparison(tuple(differences), tolerance)
