"""What `auto` is: of all ways to save memory, the one with the fastest step of those that fit.

The plan decides for each number of workers: fewer of them need more memory each.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from jobs.planning.estimate import Machines, memory_on, needed_on, time_on
from jobs.planning.state import num_blocks
from orchestrator.config import RunConfig
from orchestrator.group.usage import memory_here
from workers.calibrate import Calibration
from workers.gpus import GPUS, type_of
from workers.recipe import TrainConfig

SPARE = 0.05
"""Of a device's memory, which a choice leaves free: the plan is an estimate."""
LARGEST_MICRO_BATCH = 16
ALIKE = 0.75
"""Of a group's size, or the other way round, at which what was decided for it may hold for another one."""
MOST_LAYERS = 1024
LOOKS = 4
"""At numbers of layers that are computed again, at most: each runs the model without data."""


def decided(config: RunConfig, machines: Machines) -> RunConfig:
    """Return a config in which nothing is automatic.

    Where nothing fits it is what needs least: whoever plans it says so.
    """
    if not config.train.open:
        return config
    return _best(config, machines)


@lru_cache(maxsize=64)
def _best(config: RunConfig, machines: Machines) -> RunConfig:
    device = machines.device()
    found = [_least_again(config, machines, one) for one in _variants(config.train, machines.gpus)]
    fitting = [one for one in found if _fits(one, machines)]
    if not fitting:
        return min(found, key=lambda one: _need(one, machines))
    best = fitting[0]
    if len(fitting) > 1 and device.curves:
        best = min(fitting, key=lambda one: time_on(one, machines, device).training)
    return _exact(best, machines) if config.train.accumulate == "auto" else best


class Decider:
    """Decides for one generation of a run's workers after the other.

    What was decided last holds while it fits and the group is about as large: to find what is fastest takes longer than
    a recovery may.
    """

    def __init__(self) -> None:
        self._last: tuple[int, TrainConfig] | None = None

    def __call__(self, config: RunConfig, nodes: Sequence[str], devices: Sequence[str]) -> TrainConfig:
        """Decide.

        Args:
            config: of the run.
            nodes: of the workers, one for each rank.
            devices: what the workers' devices call themselves, each once.
        """
        if not config.train.open:
            return config.train
        if (machines := _machines(nodes, devices)) is None:
            return config.train.plain()
        if self._last is not None:
            ranks, train = self._last
            alike = ALIKE * ranks <= len(nodes) <= ranks / ALIKE
            if alike and _fits(replace(config, train=train), machines):
                return train
        train = decided(config, machines).train
        self._last = len(nodes), train
        return train


def _machines(nodes: Sequence[str], devices: Sequence[str]) -> Machines | None:
    """Return what a plan knows of the workers' machines; None for GPUs that are not in the table."""
    ranks, per_node = len(nodes), max(Counter(nodes).values())
    types = [type_of(device) for device in devices]
    if types and all(types):
        least = min(types, key=lambda name: GPUS[name].memory_gb)
        return Machines(gpus=ranks, gpus_per_node=per_node, gpu_type=least)
    if set(devices) != {"cpu"}:
        return None
    return Machines(gpus=ranks, gpus_per_node=per_node, calibration=memory_alone(memory_here()[0]))


def leanest(config: RunConfig, machines: Machines) -> RunConfig:
    """Return a config in which what is automatic is what needs least: where that does not fit, nothing does."""
    least = {"micro_batch": 1, "recompute": "all", "logits": "chunked"}
    lean = replace(config.train, **{key: least[key] for key in config.train.open if key in least})
    return min(
        (replace(config, train=one) for one in _variants(lean, machines.gpus)), key=lambda one: _need(one, machines)
    )


def deepest(config: RunConfig, machines: Machines) -> RunConfig:
    """Return a config with as many layers as fit, all else as it is; with one where none do."""
    lean = leanest(config, machines)

    def fits(layers: int) -> bool:
        return _fits(replace(lean, model=replace(config.model, num_layers=layers)), machines)

    least, most = 1, 2
    while most < MOST_LAYERS and fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return replace(config, model=replace(config.model, num_layers=least))


def memory_alone(nbytes: int, name: str = "this machine", kind: str = "cpu") -> Calibration:
    """Return a device of which the memory alone is known: nothing is timed."""
    return Calibration(
        device=name,
        kind=kind,
        precision="",
        memory_bytes=nbytes,
        seconds_per_op=0.0,
        curves={},
        host_bytes_per_s=1.0,
    )


def told(train: TrainConfig, asked: TrainConfig, blocks: int) -> str:
    """Return a line about what was chosen, "" where there was nothing to choose."""
    says = {
        "micro_batch": f"{train.micro_batch} sequence{'s' if train.micro_batch > 1 else ''} at once",
        "recompute": f"{train.recomputed(blocks)} of {blocks} layers computed again",
        "logits": f"{train.logits} logits",
        "gradients": f"{train.gradients} gradients",
    }
    if train.gradients == "whole":
        says["accumulate"] = "added up in " + ("fp32" if train.accumulate == "fp32" else "the precision of the weights")
    return ", ".join(text for key, text in says.items() if key in asked.open)


def _variants(train: TrainConfig, ranks: int) -> Iterator[TrainConfig]:
    """Yield all micro-batches and places of gradients that are allowed; the rest as fast as can be."""
    sizes = [train.micro_batch]
    if not train.micro_batch:
        most = max(1, min(LARGEST_MICRO_BATCH, -(-min(train.batches) // ranks)))
        sizes = [size for size in (1, 2, 4, 8, 16) if size <= most and math.gcd(*train.batches) % size == 0]
    for size in sizes:
        for gradients in ("whole", "partitioned") if train.gradients == "auto" else (train.gradients,):
            if gradients == "partitioned" and ranks == 1 and train.gradients == "auto":
                continue  # Its part is all of it.
            yield replace(train, micro_batch=size, gradients=gradients).plain()


def _need(config: RunConfig, machines: Machines) -> int:
    device = machines.device()
    return needed_on(memory_on(config, machines, device), machines, device)


def _limit(machines: Machines) -> float:
    return (1 - SPARE) * machines.device().memory_bytes


def _fits(config: RunConfig, machines: Machines) -> bool:
    return _need(config, machines) <= _limit(machines)


def _least_again(asked: RunConfig, machines: Machines, train: TrainConfig) -> RunConfig:
    """Return the variant with as little computed again as fits, all of it where nothing does."""
    plain, limit = replace(asked, train=train), _limit(machines)
    # All logits, and their gradient, in fp32: where these alone are too much, no model has to be run to know it.
    logits = 8 * train.micro_batch * train.seq_len * asked.model.vocab_size
    if not (asked.train.logits == "auto" and logits > limit) and _fits(plain, machines):
        return plain
    if asked.train.logits == "auto":
        plain = replace(plain, train=replace(plain.train, logits="chunked"))
        if _fits(plain, machines):
            return plain
    if asked.train.recompute != "auto":
        return plain

    def with_layers(count: int) -> RunConfig:
        return replace(plain, train=replace(plain.train, recompute=str(count)))

    blocks = num_blocks(asked.model)
    most, least = _need(plain, machines), _need(with_layers(blocks), machines)
    if least > limit:
        return with_layers(blocks)
    # Memory goes down with the layers, nearly straight: a few looks where it should meet the limit.
    few, many = (0, most), (blocks, least)
    for _ in range(LOOKS):
        if many[0] - few[0] == 1:
            break
        share = (few[1] - limit) / (few[1] - many[1])
        count = min(many[0] - 1, max(few[0] + 1, few[0] + math.ceil(share * (many[0] - few[0]))))
        found = count, _need(with_layers(count), machines)
        few, many = (found, many) if found[1] > limit else (few, found)
    return with_layers(many[0])


def _exact(config: RunConfig, machines: Machines) -> RunConfig:
    """Return it with gradients added up in fp32, where that is open, some are added up, and there is room."""
    train = config.train
    several = train.gradients == "whole" and train.slots > machines.gpus
    exact = replace(config, train=replace(train, accumulate="fp32"))
    return exact if several and _fits(exact, machines) else config
