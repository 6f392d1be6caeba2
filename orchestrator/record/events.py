"""What happened to a run besides its steps: typed, journalled, and shown on the loss's own axis.

What is stored of an event is its fields, and which event it is under a word of its own, not the name of its class.
Other versions read it, older and newer ones: a field that comes to be later needs a default, and what cannot be read
as one of our events is `Foreign`: it is shown and passed on, and counts for nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from workers.common.typed import read_fields

Reason = Literal["start", "fault", "grow", "preemption"]
"""Why a generation is formed."""
FaultSeen = Literal["killed", "hung", "error", "lost"]
"""A process is gone; it hung; it raised; nobody knows more than that a peer was lost."""
Source = Literal["start", "keepers", "keepers and storage", "storage"]
"""What it goes on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Any event. `time` in seconds since the epoch, `step` the last one that was finished."""

    stored_as: ClassVar[str] = ""
    """The journal's word for it, which never changes."""
    time: float
    step: int

    def record(self) -> dict[str, Any]:
        """Return the journal's form."""
        return {"event": self.stored_as, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault(Event):
    """Something ended a generation, or kept the next one from forming."""

    stored_as = "Fault"
    kind: FaultSeen
    cause: str
    generation: int
    during_recovery: bool
    ranks: tuple[int, ...]
    """That are gone or to blame."""
    began: float
    """When it began, as far as can be known; `time` is when it was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership(Event):
    """A generation was formed."""

    stored_as = "Membership"
    generation: int
    world_size: int
    previous_world_size: int
    reason: Reason
    nodes: tuple[str, ...]
    pids: tuple[int, ...]
    """Where each rank is."""
    devices: tuple[str, ...] = ()
    """Each once: names of GPUs, or `cpu`."""
    source: Source
    restored_step: int
    chosen: dict[str, Any] = field(default_factory=dict)
    """What is automatic in `train`, and what it is for this generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery(Event):
    """The first new step after a fault or a change of the group has begun."""

    stored_as = "Recovery"
    reason: Reason
    cause: str
    generation: int
    world_size: int
    source: Source
    steps_redone: int
    storage_bytes: int
    resumed: float
    """When that step began, in seconds since the epoch."""
    seconds: float
    """From the fault, or from the last step before an announced change, to the start of the next new step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailure(Event):
    """A checkpoint could not be written."""

    stored_as = "SaveFailure"
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback(Event):
    """The checkpoint of step `damaged` is not whole; the run goes on from that of step `good`."""

    stored_as = "Fallback"
    cause: str
    damaged: int
    good: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverStarted(Event):
    """A driver took the run over, as its attempt `attempt`; what a replay has to know of it."""

    stored_as = "DriverStarted"
    attempt: int
    config: dict[str, Any] = field(default_factory=dict)
    """Resolved, of this attempt: steps, learning rate and places may change between attempts."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """`orchestrator.record.provenance.Provenance`."""
    corpora: dict[str, str] = field(default_factory=dict)
    """URL of each source's prepared corpus, by the source's name."""
    corpus: str = ""
    """The same of the only source, in older journals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign(Event):
    """An event of another version, which this one cannot read."""

    stored: dict[str, Any]
    """All of it."""

    def record(self) -> dict[str, Any]:
        """Return what was stored."""
        return self.stored


KINDS: dict[str, type[Event]] = {
    kind.stored_as: kind for kind in (DriverStarted, Membership, Fault, Recovery, SaveFailure, Fallback)
}


def read_event(stored: Mapping[str, Any]) -> Event:
    """Return the event of which `record` has made this."""
    try:
        return read_fields(KINDS[stored["event"]], stored)
    except (KeyError, TypeError, ValueError):
        time, step = stored.get("time"), stored.get("step")
        return Foreign(
            time=time if isinstance(time, int | float) else 0.0,
            step=step if isinstance(step, int) else 0,
            stored=dict(stored),
        )


@dataclass
class Elapsed:
    """Seconds of a run over all its drivers, of which each had a clock that somebody may have set meanwhile."""

    seconds: float = 0.0
    _at: float | None = None
    _uptime: float = 0.0

    def begin(self, at: float) -> None:
        """A driver begins, by its clock at `at`: what its predecessor's clock had not reached yet has passed, too."""
        if self._at is not None:
            self.seconds += max(0.0, at - self._at)
        self._at, self._uptime = at, 0.0

    def live(self, at: float, uptime: float) -> None:
        """A driver has lived for `uptime` seconds, which no clock set changes, when its clock was at `at`."""
        self.seconds += max(0.0, uptime - self._uptime)
        self._at, self._uptime = at, uptime


@dataclass
class Tally:
    """What events and steps add up to."""

    began: float
    """When this driver began, on the monotonic clock."""
    before_s: float = 0.0
    """Seconds from the run's beginning to that."""
    productive_s: float = 0.0
    recoveries: list[Recovery] = field(default_factory=list)
    """And announced changes."""

    def step(self, seconds: float) -> None:
        """Count a step that is on record for the first time."""
        self.productive_s += seconds

    @property
    def faults(self) -> list[Recovery]:
        """The recoveries from faults, without the announced changes."""
        return [recovery for recovery in self.recoveries if recovery.reason == "fault"]

    def mean_time_to_recovery(self) -> float | None:
        """Return the mean seconds of the recoveries from faults (MTTR), None where there were none."""
        seconds = [fault.seconds for fault in self.faults]
        return sum(seconds) / len(seconds) if seconds else None

    def goodput(self, now: float) -> float:
        """Return the share of the time since the run's beginning that went into steps that count.

        Args:
            now: on the monotonic clock.
        """
        return self.productive_s / max(self.before_s + now - self.began, self.productive_s, 1e-9)
