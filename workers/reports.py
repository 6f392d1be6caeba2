"""What a worker tells the driver. Every message carries the generation, so that one from the past can be refused."""

from dataclasses import dataclass

from workers.checkpoint.manifest import ShardFile


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
    """Mean over the global batch, nats per token."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Trained on so far, by the whole run."""
    seconds: float
    """Of this step."""
    expert_imbalance: float
    """Largest expert's load over the mean, worst layer; 1 is balanced, 0 without experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated(Report):
    """A validation on the held-out split, from rank 0."""

    step: int
    loss: float
    """Nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWritten(Report):
    """One rank's part of a checkpoint is in storage; the driver commits when it has every rank's."""

    step: int
    shard: ShardFile
    counters: dict[str, int]
    shapes: dict[str, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Report):
    """Text that the trained model wrote, from rank 0."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Report):
    """The training thread has ended: `outcome` is `finished`, `paused` or `failed` (then `error` says why)."""

    outcome: str
    error: str = ""
    exit_code: int = 0
