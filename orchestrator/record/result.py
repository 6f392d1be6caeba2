"""What a run comes to."""

from dataclasses import dataclass, field

from orchestrator.record.events import Recovery


@dataclass
class RunResult:
    """What a run comes to."""

    run_id: str
    status: str = "failed"
    steps: int = 0
    tokens: int = 0
    world_size: int = 0
    """At the end."""
    val_loss_start: float | None = None
    val_loss: float | None = None
    """Nats per token: the sources' mean by weight."""
    val_bits_per_byte_start: float | None = None
    val_bits_per_byte: float | None = None
    checkpoint: str = ""
    first_step: dict[str, float] = field(default_factory=dict)
    """Seconds from the beginning to the end of this attempt's first step, part after part (`record/start.py`)."""
    sample: str = ""
    recoveries: int = 0
    """Faults that the run has survived."""
    changes: list[Recovery] = field(default_factory=list)
    """Each recovery and each announced change of the group."""
    goodput: float | None = None
    """Share of the time since the run's beginning that went into steps that count."""
    mttr_s: float | None = None
    """Mean seconds from a fault to the start of the next new step."""
    losses: tuple[list[tuple[int, float]], list[tuple[int, float]]] = ((), ())  # type: ignore[assignment]
    """Training and validation losses of the whole run, `(step, nats per token)`."""
    page: str = ""
    """Path of the run in MLflow's UI."""
