"""Where a training thread is. Without torch: the driver's watchdog asks it who is behind whom, and for how long."""

from enum import Enum


class Phase(Enum):
    """What a training thread does, in the order of a generation and, in it, of each step.

    Ranks wait for one another at many places, so whoever hangs is one of those that have come the least far: at the
    lowest step, and there in the phase with the lowest `order`. What marks a place in the code marks it in this order.
    """

    order: int
    """Place in a step; a thread never goes back in it before its step is over."""
    patient: bool
    """Whether it may take longer than a step's other phases do: how long depends on the model, the data or storage."""

    def __new__(cls, name: str, patient: bool = False) -> "Phase":  # noqa: D102
        phase = object.__new__(cls)
        phase._value_, phase.order, phase.patient = name, len(cls.__members__), patient
        return phase

    IDLE = "idle", True
    """In no generation: not yet, or not any more."""
    JOIN = "join", True
    """Process group and engine."""
    RESTORE = "restore", True
    """The state, read from keepers or storage."""
    COMPUTE = "compute"
    """Micro-batches, forward and backward."""
    WAIT = "wait"
    """For the copy of the last snapshot."""
    REDUCE = "reduce"
    """Gradients, up to the first group's update."""
    GATHER = "gather"
    """What follows a group's update: the weights' all-gather, and the next group."""
    MEASURE = "measure", True
    """Telemetry of the update."""
    SNAPSHOT = "snapshot"
    """The shard, into the keeper's memory."""
    BOUNDARY = "boundary"
    """What all ranks agree on."""
    AGREE = "agree"
    """The rest of the snapshot."""
    VALIDATE = "validate", True
    """After the step."""
    SAVE = "save"
    """A snapshot for a checkpoint or a pause, after the step and its validation."""
    SAMPLE = "sample", True
    """Text of the trained model."""
