"""The whole plan of a run on so many devices, and the refusal of what cannot fit, with what would.

Nothing is started and no Ray is imported: `raymuon plan`, `train`, `submit` and `replay` call it alike.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.planning.choice import decided, leanest, told
from jobs.planning.estimate import Machines, gigabytes, memory_on, needed_on, sent_on, time_on
from jobs.planning.goodput import UPLOAD_BYTES_PER_S, Goodput, failures_of, goodput
from jobs.planning.memory import PROCESS_BYTES, Memory
from jobs.planning.state import layout_of, num_blocks
from jobs.planning.timing import StepTime
from jobs.planning.traffic import boundary_bytes
from jobs.planning.widths import scaled
from optim.assignment import PlanFigures
from optim.config import precision_on
from optim.exchange import dtype_on
from orchestrator.config import RunConfig
from workers.calibrate import Calibration
from workers.common.errors import ConfigError
from workers.data.order import most_slots
from workers.gpus import GPUS
from workers.recipe import TrainConfig

MOST_GPUS = 8192
"""Beyond which nothing is looked for that would fit."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is known of a run besides its config and its machines."""

    price: float | None = None
    """Money per GPU-hour; None: money is not told."""
    tokens: int | None = None
    """To train on; None for those of the config."""
    mtbf_hours: float | None = None
    """Mean hours between failures of one GPU with its share of a node; None: goodput is not told."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a stage of a run needs."""

    name: str
    steps: int
    tokens: int
    global_batch: int
    time: StepTime

    @property
    def seconds(self) -> float:
        """Return the seconds of all of it, without faults."""
        return self.steps * self.time.total

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "name": self.name,
            "steps": self.steps,
            "tokens": self.tokens,
            "global_batch": self.global_batch,
            "step_seconds": self.time.total,
            "tokens_per_second": self.tokens / self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs."""

    config: RunConfig
    """In which nothing is automatic."""
    asked: RunConfig
    """As it was given."""
    machines: Machines
    device: Calibration
    parameters: int
    memory: Memory
    sent: dict[str, float]
    """Bytes that the mean rank sends in DeepSpeed's step, by collective."""
    boundary_bytes: float
    snapshot_bytes: int
    """That a node's keeper gets for each snapshot; as many go to its buddy on another node."""
    matrices: PlanFigures | None
    time: StepTime
    """Of the stage with most tokens, where there are several."""
    tokens_per_second: float
    mfu: float
    """The model's operations over the device's rate of large products."""
    stages: tuple["StagePlan", ...]
    """Empty where the run is one."""
    tokens: int
    days: float
    """With the expected goodput, where a failure rate is given."""
    gpu_hours: float
    money: float | None
    goodput: Goodput | None

    @property
    def fits(self) -> bool:
        """Tell whether the worst phase fits into the device's memory."""
        return self.needed <= self.device.memory_bytes

    @property
    def needed(self) -> int:
        """Return the bytes that have to fit into the device's memory."""
        return needed_on(self.memory, self.machines, self.device)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        machines = {key: value for key, value in vars(self.machines).items() if key != "calibration"}
        return {
            "name": self.config.run.name,
            "chosen": {key: getattr(self.config.train, key) for key in self.asked.train.open},
            "device": self.device.device,
            **machines,
            "parameters": self.parameters,
            "fits": self.fits,
            "memory": {
                "device_bytes": self.device.memory_bytes,
                "needed_bytes": self.needed,
                "peak_bytes": self.memory.peak,
                "worst_phase": self.memory.worst_phase,
                "state": self.memory.state,
                "phases": self.memory.phases,
                "fixed_bytes": self.memory.fixed,
                "keeper_bytes_per_node": self.memory.keeper_bytes_per_node,
                "host_build_bytes_per_node": self.host_build_bytes,
            },
            "bytes_sent": {
                **self.sent,
                "boundary": self.boundary_bytes,
                "snapshot_per_node": self.snapshot_bytes,
            },
            "matrices": self.matrices and self.matrices.as_dict(),
            "width_rule": [asdict(kind) for kind in scaled(self.config.model, self.config.optim)],
            "seconds": self.time.as_dict(),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "stages": [
                {**stage.as_dict(), **dict(zip(("days", "money"), self.of_stage(stage), strict=True))}
                for stage in self.stages
            ],
            "tokens": self.tokens,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "money": self.money,
            "goodput": self.goodput and asdict(self.goodput),
        }

    def of_stage(self, stage: "StagePlan") -> tuple[float, float | None]:
        """Return the days of a stage and its money, both its share of the run's."""
        share = stage.seconds / sum(one.seconds for one in self.stages)
        return share * self.days, None if self.money is None else share * self.money

    def summary(self) -> str:
        """Return one line for a terminal or a log, and a second one about what was chosen."""
        chosen = f"\n{self.chosen}" if self.chosen else ""
        return (
            f"{self.machines.gpus} x {self.device.device}: {gigabytes(self.needed)} of "
            f"{gigabytes(self.device.memory_bytes)}, {self.time.total:.3g} s a step, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.days:.3g} days{chosen}"
        )

    @property
    def host_build_bytes(self) -> int:
        """Return a node's host memory for the models of a new run: each rank draws its own there, in fp32.

        A run that goes on from a checkpoint or a snapshot draws none, but has the same memory while it is built.
        """
        return 4 * self.parameters * min(self.machines.gpus, self.machines.gpus_per_node)

    @property
    def chosen(self) -> str:
        """Return a line about what `auto` has come to, "" where nothing is."""
        return told(self.config.train, self.asked.train, num_blocks(self.config.model))

    def require_fit(self) -> None:
        """Refuse what cannot fit.

        Raises:
            ConfigError: it needs more memory than there is; with its parts, and with what would fit.
        """
        require_fit(self.asked, self.machines, self.device, self.memory)


def plan_run(config: RunConfig, machines: Machines, terms: Terms = Terms()) -> Plan:
    """Plan a run.

    Args:
        config: of the run.
        machines: on which.
        terms: what is known besides.

    Raises:
        ConfigError: the device is unknown.
    """
    if terms.tokens:
        config = replace(config, train=_as_long(config.train, terms.tokens))
    device, asked = machines.device(), config
    config = decided(config, machines)
    train, optim = config.train, config.optim
    if precision_on(device.kind, train.precision) != device.precision:
        raise ConfigError(
            f"train.precision={train.precision}: the figures of {device.device} are of {device.precision} products; "
            "plan with train.precision=auto, or with a calibration of such a device"
        )
    layout = layout_of(config.model, optim, machines.gpus)
    memory = memory_on(config, machines, device)
    itemsize, wire = (dtype_on(device.kind, of).itemsize for of in (train.precision, optim.wire_dtype))
    sent = sent_on(config, machines, device)
    if "reduce" in sent and train.gradients == "partitioned":
        sent["reduce"] *= most_slots(train.slots, machines.gpus)

    stages = [_stage(config, number, machines, device) for number in range(len(train.lengths))]
    tokens, seconds = sum(stage.tokens for stage in stages), sum(stage.seconds for stage in stages)
    time, speed = max(stages, key=lambda stage: stage.tokens).time, tokens / seconds
    expected = None
    ranks_per_node = min(machines.gpus, machines.gpus_per_node)
    if terms.mtbf_hours is not None:
        failures = failures_of(
            terms.mtbf_hours, machines.gpus, ranks_per_node, layout.state_bytes, device.host_bytes_per_s * device.share
        )
        expected = goodput(
            failures,
            time.training + time.validation,
            time.snapshot * time.snapshot_every,
            time.snapshot_every,
            config.checkpoint.every,
            train.steps,
            upload_s=ranks_per_node * layout.state_bytes / UPLOAD_BYTES_PER_S,
        )
    # Goodput counts snapshots as lost time; the speed has them already.
    useful = expected.share * time.total / (time.training + time.validation) if expected else 1.0
    days = (terms.tokens or tokens) / speed / useful / 86400 if useful else float("inf")
    hours = days * 24 * machines.gpus
    peak = device.curves["matmul"].rates[-1]
    if machines.gpu_type:
        peak = max(gpu.tflops for name, gpu in GPUS.items() if device.device.startswith(f"{name} (")) * 1e12
    return Plan(
        config=config,
        asked=asked,
        machines=machines,
        device=device,
        parameters=layout.parameters,
        memory=memory,
        sent=sent,
        boundary_bytes=boundary_bytes(layout),
        snapshot_bytes=ranks_per_node * layout.snapshot.values,
        matrices=layout.plan_figures(optim, itemsize, wire),
        time=time,
        tokens_per_second=speed,
        mfu=layout.flops_per_token(train.seq_len) * speed / machines.gpus / peak,
        stages=tuple(stages) if train.stages else (),
        tokens=terms.tokens or tokens,
        days=days,
        gpu_hours=hours,
        money=None if terms.price is None else terms.price * hours,
        goodput=expected,
    )


def _as_long(train: TrainConfig, tokens: int) -> TrainConfig:
    """Return it with the steps of so many tokens."""
    if train.stages:
        raise ConfigError(f"--tokens {tokens}: this config has train.stages, which are as long as they say themselves")
    return replace(train, steps=-(-tokens // (train.global_batch * train.seq_len)), tokens=0.0)


def _stage(config: RunConfig, number: int, machines: Machines, device: Calibration) -> StagePlan:
    train = config.train.of_stage(number)
    return StagePlan(
        name=config.recipe.stages[number].name,
        steps=train.steps,
        tokens=train.steps * train.global_batch * train.seq_len,
        global_batch=train.global_batch,
        time=time_on(replace(config, train=train), machines, device),
    )


def require_fit(config: RunConfig, machines: Machines, device: Calibration, memory: Memory) -> None:
    """Refuse a run that needs more than the device has.

    Raises:
        ConfigError: with the parts of what it needs, and with what would fit.
    """
    if (needed := needed_on(memory, machines, device)) <= device.memory_bytes:
        return
    held = memory.parts()
    if device.kind != "cuda":  # A whole machine's, as `needed_on` counts it.
        ranks = min(machines.gpus, machines.gpus_per_node)
        held = {name: ranks * nbytes for name, nbytes in (held | {"processes": PROCESS_BYTES}).items()}
        held["snapshots"] = memory.keeper_bytes_per_node
    parts = sorted(held.items(), key=lambda part: -part[1])
    lines = [
        f"{config.run.name} does not fit: {gigabytes(needed)} are needed in its worst phase "
        f"({memory.worst_phase}), {device.device} has {gigabytes(device.memory_bytes)}",
        "  " + ", ".join(f"{name} {gigabytes(nbytes)}" for name, nbytes in parts if nbytes),
    ]
    found = list(what_would_fit(config, machines))
    if chosen := told(decided(config, machines).train, config.train, num_blocks(config.model)):
        lines.append(f"  with {chosen}")
    lines += [f"  would fit: {text}" for text in found]
    if not found:
        many = "the number of GPUs or their type" if device.kind == "cuda" else "the number of workers"
        lines.append(
            f"  nothing that only changes train.micro_batch, {many} would fit; make the model or train.seq_len smaller"
        )
    raise ConfigError("\n".join(lines))


def what_would_fit(config: RunConfig, machines: Machines) -> Iterator[str]:
    """Plan other micro-batches, numbers of GPUs and types, and yield the smallest change of each kind that fits."""
    device, train = machines.device(), config.train
    least = replace(config, train=replace(train, micro_batch=1))

    def needs(changed: RunConfig, gpus: int) -> int:
        on = replace(machines, gpus=gpus)
        return needed_on(memory_on(leanest(changed, on), on, device), on, device)

    for size in range(train.micro_batch - 1, 0, -1):
        if math.gcd(*train.batches) % size == 0:
            smaller = replace(config, train=replace(train, micro_batch=size))
            if needs(smaller, machines.gpus) <= device.memory_bytes:
                yield f"train.micro_batch={size} instead of {train.micro_batch}, with as many ranks"
                break
    if device.kind == "cpu":  # Its ranks share one memory: fewer of them need less.
        ranks = machines.gpus // 2
        while ranks and needs(config, ranks) > device.memory_bytes:
            ranks //= 2
        if ranks:
            yield f"{ranks} worker(s)"
        return
    variants = [(config, "")] if train.micro_batch <= 1 else [(config, ""), (least, " with train.micro_batch=1")]
    for changed, note in variants:
        # What does not shrink with the number of GPUs is what the largest number still needs.
        if needs(changed, MOST_GPUS) <= device.memory_bytes:
            gpus = machines.gpus * 2
            while gpus < MOST_GPUS and needs(changed, gpus) > device.memory_bytes:
                gpus *= 2
            yield f"{gpus} GPUs{note}"
            break
    if machines.gpu_type:
        for changed, note in variants:
            need = needs(changed, machines.gpus)
            large = [name for name in GPUS if GPUS[name].memory_gb * 10**9 >= need]
            if large:
                name = min(large, key=lambda name: (GPUS[name].memory_gb, -GPUS[name].tflops))
                yield f"{machines.gpus} x {name} ({GPUS[name].memory_gb} GB){note}"
                break


def with_types(config: RunConfig, machines: Machines) -> list[Machines]:
    """Return the machines with the GPU of least memory that holds the run, and with the fastest that does.

    Where none does it is the largest, alone.
    """

    def holds(gpu_type: str) -> bool:
        on = replace(machines, gpu_type=gpu_type)
        memory = memory_on(leanest(config, on), on, on.device())
        return needed_on(memory, on, on.device()) <= GPUS[gpu_type].memory_gb * 10**9

    types = [name for name in GPUS if holds(name)] or [max(GPUS, key=lambda name: GPUS[name].memory_gb)]
    smallest = min(types, key=lambda name: (GPUS[name].memory_gb, -GPUS[name].tflops))
    fastest = max(types, key=lambda name: (GPUS[name].tflops, -GPUS[name].memory_gb))
    return [replace(machines, gpu_type=name) for name in dict.fromkeys((smallest, fastest))]
