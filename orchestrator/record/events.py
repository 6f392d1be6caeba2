"""What happened to a run besides its steps: typed, journalled, and shown on the loss's own axis."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Reason = Literal["start", "fault", "grow", "preemption"]
"""Why a generation is formed."""
FaultSeen = Literal["killed", "hung", "error", "lost"]
"""A process is gone; it hung; it raised; nobody knows more than that a peer was lost."""
Source = Literal["start", "keepers", "keepers and storage", "storage"]
"""What it goes on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Any event. `time` in seconds since the epoch, `step` the last one that was finished."""

    time: float
    step: int

    def record(self) -> dict[str, Any]:
        """Return the journal's form."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault(Event):
    """Something ended a generation, or kept the next one from forming."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery(Event):
    """The first new step after a fault or a change of the group has begun."""

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

    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback(Event):
    """The checkpoint of step `damaged` is not whole; the run goes on from that of step `good`."""

    cause: str
    damaged: int
    good: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverStarted(Event):
    """A driver took the run over, as its attempt `attempt`; what a replay has to know of it."""

    attempt: int
    config: dict[str, Any] = field(default_factory=dict)
    """Resolved, of this attempt: steps, learning rate and places may change between attempts."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """`orchestrator.record.provenance.Provenance`."""
    corpus: str = ""
    """URL of the prepared corpus."""


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
    recoveries: list[dict[str, Any]] = field(default_factory=list)

    def step(self, seconds: float) -> None:
        """Count a step that is on record for the first time."""
        self.productive_s += seconds

    def recovered(self, event: Recovery) -> None:
        """Count a recovery; announced changes are listed, too."""
        self.recoveries.append(event.record())

    @property
    def faults(self) -> list[dict[str, Any]]:
        """The recoveries from faults, without the announced changes."""
        return [recovery for recovery in self.recoveries if recovery["reason"] == "fault"]

    def mean_time_to_recovery(self) -> float | None:
        """Return the mean seconds of the recoveries from faults (MTTR), None where there were none."""
        seconds = [fault["seconds"] for fault in self.faults]
        return sum(seconds) / len(seconds) if seconds else None

    def goodput(self, now: float) -> float:
        """Return the share of the time since the run's beginning that went into steps that count.

        Args:
            now: on the monotonic clock.
        """
        return self.productive_s / max(self.before_s + now - self.began, self.productive_s, 1e-9)
