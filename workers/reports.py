"""What a worker tells the driver. Every message carries the generation, so that one from the past can be refused."""

from dataclasses import dataclass, field

from workers.checkpoint.manifest import ShardFile
from workers.phases import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Any message of a worker."""

    generation: int
    rank: int
    time: float
    """Seconds since the epoch, when it happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Report):
    """A finished optimizer step, from rank 0."""

    step: int
    loss: float
    """Mean over the targets that count in the global batch, nats per token."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Targets that counted so far, in the whole run."""
    step_tokens: int
    """Of them, this step's."""
    seconds: float
    """Of this step."""
    expert_imbalance: float
    """Largest expert's load over the mean, worst layer; 1 is balanced, 0 without experts."""
    skipped: int
    """Steps of the run whose gradient was not finite, so that they changed nothing."""
    snapshot_every: int
    """Steps between snapshots."""
    snapshot_seconds: float
    """That the last snapshot held training up, mean over the ranks."""
    data: dict[str, float] = field(default_factory=dict)
    """Seconds waited for tokens, and of each named source the tokens and epochs so far, by metric."""
    measured: dict[str, float] = field(default_factory=dict)
    """Telemetry by metric, on the steps where it is due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated(Report):
    """A validation on the held-out splits, from rank 0."""

    step: int
    loss: float
    """Nats per token, of the sources' mean by weight."""
    by_source: dict[str, float] = field(default_factory=dict)
    """Each named source's."""
    bits_per_byte: float | None = None
    """Of the text in the mixture; None in snapshots of versions that did not tell it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terminating(Report):
    """This worker's process was asked to end (SIGTERM): it leaves at the next boundary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored(Report):
    """This rank has taken its state and begins to train."""

    step: int
    storage_bytes: int
    """Read from storage for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWritten(Report):
    """A keeper has put one rank's part of a checkpoint into storage; the driver commits when it has every rank's."""

    step: int
    world_size: int
    shard: ShardFile
    counters: dict[str, int]
    shapes: dict[str, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Report):
    """A keeper could not write a shard: that checkpoint will not come."""

    step: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRetried(Report):
    """A keeper could not write a shard, and tries again."""

    step: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSkipped(Report):
    """A checkpoint was left out: earlier ones are still being written."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDamaged(Report):
    """A worker could not load the checkpoint of `step`: a file of it is missing or is not what was written.

    Where the run has no checkpoint yet, it is the one that `train.init` names.
    """

    step: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperLost(Report):
    """A worker cannot reach its keeper any more; training goes on without new snapshots."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Report):
    """How the optimizer shares its matrices out over the generation, from rank 0, once in an attempt."""

    figures: dict[str, float]
    """`optim.assignment.PlanFigures`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Report):
    """Text that the trained model wrote, from rank 0."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled(Report):
    """The profiler's trace of the steps up to `step`, from rank 0."""

    step: int
    trace: bytes
    """Gzipped JSON in Chrome's trace format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Report):
    """The training thread has left: `finished`, `paused`, `lost` a peer or `failed` (`error` says why)."""

    outcome: str
    step: int = -1
    """Finished last; known of those that finished or paused."""
    error: str = ""
    exit_code: int = 0
    """Of an error that nobody can recover from by trying again; 0 for all others."""
    broken: bool = False
    """The process cannot be used again (a CUDA context with an error, for instance)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Where a worker's training thread is."""

    generation: int
    step: int
    phase: Phase
    age_s: float
    """Since it came there."""
    busy_s: float
    """Seconds per micro-batch that this rank computes, before it waits for anybody; 0 if not known yet."""
    cpu: float
    """Processors that the process uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """The answer to a poll; that there is one is the heartbeat."""

    reports: list[Report]
    mark: Mark | None
