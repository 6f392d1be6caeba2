"""How much of the time goes into new steps when things fail, and how often to save for it. Pure functions.

Two kinds of failure, each memoryless. A worker or a node is lost: the others go on from the last snapshot in the
keepers' memory. The head is lost, and the driver with it: a new one starts from the last checkpoint in storage.

Sources: J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974; J. T. Daly, A
higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006.
"""

import math
from dataclasses import dataclass

WORKER_RECOVERY_S = 0.55
"""From a worker's death to the next new step, beside the way of its state (docs/benchmarks.md, measured)."""
NODE_RECOVERY_S = 2.33
"""Likewise for a node."""
HEAD_RECOVERY_S = 20.0
"""From the command to the first step (docs/benchmarks.md: 17.6 to 19.7 s), beside the way of the state."""
UPLOAD_BYTES_PER_S = 80e6
"""Of a node's keeper to S3, hashes included (docs/benchmarks.md: 78 to 85 MB/s on two shared cores)."""


@dataclass(frozen=True, kw_only=True)
class Failures:
    """How often what is lost, and what one loss costs beside the steps that are done again."""

    worker_mtbf_s: float
    """Mean seconds between losses of any worker or node, over the whole group."""
    head_mtbf_s: float
    worker_recovery_s: float
    head_recovery_s: float


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The share of the time that goes into new steps, and the intervals with which it is largest."""

    share: float
    """With the config's own intervals."""
    best_share: float
    best_snapshot_every: int
    """Steps."""
    best_checkpoint_every: int
    """Steps."""
    worker_losses_per_day: float
    head_losses_per_day: float


def best_interval(cost: float, mtbf: float) -> float:
    """Return the seconds of work between two saves that waste least (Daly 2006, equation 37).

    To first order it is Young's `sqrt(2 cost mtbf)`.

    Args:
        cost: seconds that a save holds work up.
        mtbf: mean seconds between failures.
    """
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def useful_share(interval: float, cost: float, mtbf: float, recovery: float, stretch: float = 1.0) -> float:
    """Return the useful share of the time with a save of `cost` after every `interval` (Daly 2006, equation 20).

    A failure loses what was done since the last save; one during the recovery begins it anew.

    Args:
        interval: seconds of work between saves.
        cost: seconds of a save.
        mtbf: mean seconds between failures.
        recovery: seconds from a failure to the first new work.
        stretch: how much longer work and saves take for other reasons.
    """
    exponent = (interval + cost) * stretch / mtbf
    if exponent > 500 or recovery / mtbf > 500:
        return 0.0
    return interval / (mtbf * math.exp(recovery / mtbf) * math.expm1(exponent))


def goodput(
    failures: Failures,
    step_s: float,
    snapshot_s: float,
    snapshot_every: int,
    checkpoint_every: int,
    steps: int,
    upload_s: float,
) -> Goodput:
    """Return what a run may expect.

    A checkpoint goes out from a snapshot in the keeper's memory, so it costs a snapshot where none is due, and no more;
    a new one makes no sense before the last is in storage.

    Args:
        failures: how often, and what they cost.
        step_s: seconds of a step without its snapshot.
        snapshot_s: seconds of a snapshot.
        snapshot_every: steps between snapshots.
        checkpoint_every: steps between checkpoints; 0 for the last step only.
        steps: of the run.
        upload_s: seconds of a checkpoint's way to storage.
    """

    def share(snapshots: int, checkpoints: int) -> float:
        inner = useful_share(snapshots * step_s, snapshot_s, failures.worker_mtbf_s, failures.worker_recovery_s)
        if not inner:
            return 0.0
        extra = 0.0 if checkpoints % snapshots == 0 else snapshot_s
        return useful_share(checkpoints * step_s, extra, failures.head_mtbf_s, failures.head_recovery_s, 1 / inner)

    # Any snapshot can become a checkpoint: so they are as frequent as one or the other kind of failure wants them.
    wanted = [best_interval(snapshot_s, mtbf) / step_s for mtbf in (failures.worker_mtbf_s, failures.head_mtbf_s)]
    pairs = []
    for every in {min(steps, max(1, round(interval))) for interval in wanted}:
        pairs.append((every, every * max(1, math.ceil(upload_s / step_s / every))))
    best = max(pairs, key=lambda pair: share(*pair))
    return Goodput(
        share=share(snapshot_every, checkpoint_every or steps),
        best_share=share(*best),
        best_snapshot_every=best[0],
        best_checkpoint_every=best[1],
        worker_losses_per_day=86400 / failures.worker_mtbf_s,
        head_losses_per_day=86400 / failures.head_mtbf_s,
    )


def failures_of(
    mtbf_hours: float, gpus: int, gpus_per_node: int, state_bytes: int, host_bytes_per_s: float
) -> Failures:
    """Return how a group fails whose GPUs fail, each with its share of a node, once in so many hours.

    The head is a node without GPUs, which fails as often as one with them.

    Args:
        mtbf_hours: of one GPU.
        gpus: in the group.
        gpus_per_node: that are lost with a node.
        state_bytes: of one rank, which come from a keeper's memory.
        host_bytes_per_s: speed of that.
    """
    return Failures(
        worker_mtbf_s=3600 * mtbf_hours / gpus,
        head_mtbf_s=3600 * mtbf_hours / min(gpus, gpus_per_node),
        worker_recovery_s=NODE_RECOVERY_S + state_bytes / host_bytes_per_s,
        head_recovery_s=HEAD_RECOVERY_S + state_bytes * min(gpus, gpus_per_node) / UPLOAD_BYTES_PER_S,
    )
