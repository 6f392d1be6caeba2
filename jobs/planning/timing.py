"""A step's seconds: the slowest rank's micro-batches, DeepSpeed's passes over the gradients, the optimizer, the wire.

What DeepSpeed does to a step's gradients is written down as passes over memory, in the order of its code; the
optimizer's work is that of the plan's busiest rank, for which Newton-Schulz itself is run without data.
"""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jobs.planning.cost import seconds
from jobs.planning.state import Layout
from jobs.planning.traffic import boundary_bytes
from jobs.planning.work import MicroBatch, recorded
from optim.config import OptimConfig
from optim.exchange import Rule, cut, dtype_on, square_of
from optim.newton_schulz import Workspace
from optim.zero1 import kinds_of
from workers.calibrate import Calibration, Collective
from workers.common.errors import ConfigError
from workers.config import CheckpointConfig
from workers.data.order import most_slots
from workers.recipe import TrainConfig
from workers.settings import overlapped
from workers.snapshots.schedule import steps_between
from workers.work import Work, Works, elementwise

OVERLAP_SHARE = 0.9
"""Of a pass, in which gradients or weights can be on their way: the first bucket is full a little later. Assumed."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part; the parts do not overlap."""

    forward: float
    backward: float
    reduction: float
    """DeepSpeed's passes over the gradients and their way to their owners, without what the backward pass hides."""
    optimizer: float
    gather: float
    """The weights' all-gather, without what the forward pass hides."""
    boundary: float
    """The all-reduce in which all ranks agree."""
    snapshot: float
    """Mean over the steps between snapshots."""
    validation: float
    """Mean over the steps between validations."""
    snapshot_every: int
    newton_schulz_share: float
    """Of the step, on the busiest rank."""
    hidden: float
    """Of the gradients' way under the backward pass, and of the weights' under the next forward pass."""

    @property
    def training(self) -> float:
        """Return the seconds of a step without snapshots and validations."""
        return self.forward + self.backward + self.reduction + self.optimizer + self.gather + self.boundary

    @property
    def total(self) -> float:
        """Return the seconds of a step, its share of snapshots and validations included."""
        return self.training + self.snapshot + self.validation

    def as_dict(self) -> dict[str, float]:
        """Return all of it."""
        return {**asdict(self), "training": self.training, "total": self.total}


def reduction_works(layout: Layout, itemsize: int) -> Works:
    """Return what DeepSpeed does to the gradients between the backward pass and the optimizer."""
    works: Works = Counter()
    ranks = layout.groups[0].layout.world_size
    for group in layout.groups:
        for numel in group.layout.numels:
            works[elementwise(2 * itemsize * numel)] += 1  # into the bucket
            works[elementwise(2 * itemsize * numel / ranks)] += 1  # into the partition's buffer
            works[elementwise((itemsize + 16) * numel / ranks)] += 1  # the norm, in fp64
        flat = itemsize * group.layout.partition
        if ranks > 1:
            works[elementwise(2 * flat)] += ranks + 1  # packed for each owner, unpacked by it
        works[elementwise(2 * flat)] += 1  # laid out flat
        works[elementwise(8 * group.layout.partition)] += 1  # clipped
        if itemsize == 2:
            works[elementwise(6 * group.layout.partition)] += 1  # cast to fp32
            works[elementwise(flat)] += 2  # whether it is finite
        works[elementwise((4 + itemsize) * group.layout.partition)] += 1  # the new weights
    works[elementwise(2 * itemsize * layout.parameters)] += 1  # divided by the number of ranks
    works[Work("call")] += 30 * layout.tensors  # hooks, views and bookkeeping for each tensor
    return works


def update_works(layout: Layout, optim: OptimConfig, kind: str) -> tuple[Works, Works]:
    """Return the busiest rank's passes over its shard, and its Newton-Schulz."""
    passes: Works = Counter()
    products: Works = Counter()
    for group in layout.groups:
        if group.method == "adamw":
            # Weights and state are read and written, the gradient is read.
            passes[elementwise(4 * group.layout.partition * (2 * len(kinds_of("adamw")) + 1))] += 1
    if (plan := layout.plan) is None:
        return passes, products
    loads = [sum(optim.operations(*shape) for shape in plan.matrices(rank)) for rank in range(len(plan.local))]
    rank = loads.index(max(loads))
    shapes = Counter((part.count, part.rows, part.columns) for batch in plan.local[rank] for part in cut(batch, kind))
    shapes.update((1, matrix.rows, matrix.columns) for matrix in plan.straddlers if matrix.owner == rank)
    for shape, times in shapes.items():
        around, orthogonalization = _matrix_works(shape, optim, kind)
        for works, into in ((around, passes), (orthogonalization, products)):
            into.update({work: each * times for work, each in works.items()})
    return passes, products


@lru_cache(maxsize=256)
def _matrix_works(shape: tuple[int, int, int], optim: OptimConfig, kind: str) -> tuple[Works, Works]:
    """Run the optimizer's rule without data; return what is around the orthogonalization, and that."""
    rule = Rule(optim, kind)
    # A CPU's symmetric products are cut into blocks, so the tensors have to say that they are there.
    with FakeTensorMode() if kind == "cpu" else nullcontext():
        device, workspace = "cpu" if kind == "cpu" else "meta", Workspace()
        weights, gradient, momentum = (torch.empty(shape, device=device) for _ in range(3))
        busy = torch.empty(shape[0], 1, 1, dtype=torch.bool, device=device)
        rule.orthogonalize(gradient, workspace)  # Whose memory is there from then on.
        with recorded() as recorder:
            rule.orthogonalize(gradient, workspace)
            products = recorder.take_works()
            square_of(gradient)
            rule.step(weights, gradient, momentum, busy, 0.0, 0.0, workspace)
    return recorder.take_works() - products, products


def wire_seconds(calibration: Calibration, name: str, ranks: int, nbytes: float, calls: int = 1) -> float:
    """Return the seconds of a collective: a latency for each call and the bytes at its speed.

    Raises:
        ConfigError: none of its kind has been measured.
    """
    if ranks == 1 or not calls:
        return 0.0
    known = [one for one in calibration.collectives if one.name == name]
    if not known:
        raise ConfigError(
            f"the calibration of {calibration.device} has no {name}, for {ranks} GPUs; measure with two workers or more"
        )
    near: Collective = min(known, key=lambda one: abs(math.log(one.world_size / ranks)))
    # A ring's latency grows with its ranks, what each sends hardly.
    latency = near.latency_s * max(1.0, math.log2(ranks) / math.log2(near.world_size))
    return calls * latency + nbytes / near.bytes_per_s


def step_time(
    layout: Layout,
    micro: MicroBatch,
    sent: dict[str, float],
    train: TrainConfig,
    optim: OptimConfig,
    checkpoint: CheckpointConfig,
    calibration: Calibration,
) -> StepTime:
    """Return the seconds of a step on the slowest rank."""
    ranks, itemsize = layout.groups[0].layout.world_size, dtype_on(calibration.kind, train.precision).itemsize
    rounds = most_slots(train.slots, ranks)

    def wire(name: str, calls: int) -> float:
        return wire_seconds(calibration, name, ranks, sent.get(name, 0.0), calls if name in sent else 0)

    forward = rounds * seconds(micro.forward, calibration)
    backward = rounds * seconds(micro.backward, calibration)
    partitioned = train.gradients == "partitioned"
    if not partitioned:
        backward += (rounds - 1) * seconds(micro.accumulation, calibration)
    times, on_wire, gather = (
        (rounds if partitioned else 1),
        wire("reduce", ranks),
        wire("all_gather", len(layout.groups)),
    )
    hidden = hidden_gather = 0.0
    if overlapped(train, calibration.kind):
        hidden = min(on_wire, OVERLAP_SHARE * seconds(micro.backward, calibration))
        hidden_gather = min(gather, OVERLAP_SHARE * seconds(micro.forward, calibration))
    reduction = times * (seconds(reduction_works(layout, itemsize), calibration) + on_wire - hidden)
    reduction += wire("all_reduce", len(layout.groups))
    passes, products = update_works(layout, optim, calibration.kind)
    orthogonalization = seconds(products, calibration)
    optimizer = seconds(passes, calibration) + orthogonalization + wire("all_to_all", 2)
    gather -= hidden_gather
    boundary = wire_seconds(calibration, "all_reduce", ranks, boundary_bytes(layout))
    training = forward + backward + reduction + optimizer + gather + boundary

    cost = layout.snapshot.values / calibration.host_bytes_per_s / calibration.share
    every = steps_between(checkpoint.snapshot_every, checkpoint.snapshot_share, cost, training)
    chunks = most_slots(-(-train.validate_sequences // train.micro_batch), ranks)
    validation = chunks * seconds(micro.forward, calibration) * train.validations / train.steps
    return StepTime(
        forward=forward,
        backward=backward,
        reduction=reduction,
        optimizer=optimizer,
        gather=gather,
        boundary=boundary,
        snapshot=cost / every,
        validation=validation,
        snapshot_every=every,
        newton_schulz_share=orthogonalization / training,
        hidden=times * hidden + hidden_gather,
    )
