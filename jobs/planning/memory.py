"""The memory of one rank, by part and by phase of a step, and that of a node's keeper. Pure Python.

The peak is that of the worst phase, not the sum of all parts: activations are gone before the gradients are reduced,
and DeepSpeed's bucket before Newton-Schulz begins. State and weights are exact, to the byte; the phases follow
DeepSpeed's code (`runtime/zero/stage_1_and_2.py` of 0.19.8), the activations the model's own code (`work.py`).
"""

import math
from dataclasses import dataclass

from jobs.planning.state import Layout
from jobs.planning.work import HEAP_BLOCK, MicroBatch
from optim.assignment import OrthogonalizePlan
from optim.config import OptimConfig
from optim.exchange import cut, dtype_on
from optim.newton_schulz import workspace_shapes
from orchestrator.group import keeper
from workers.recipe import TrainConfig
from workers.settings import deepspeed_config

FIXED_BYTES = {"cpu": 50 * 10**6, "cuda": 2 * 1024**3}
"""Beside what is counted. On a CPU libraries and mapped data, measured. On a GPU CUDA's context, cuBLAS' workspaces and
NCCL's buffers, assumed."""
PROCESS_BYTES = 400 * 10**6
"""Of a process on a CPU that has torch and DeepSpeed loaded and nothing else, measured."""
FRAGMENTED = {"cpu": 0.4, "cuda": 0.05}
"""What the allocator needs more than what lives in it: on a CPU of the heap, measured (docs/commands/plan.md); on a GPU
of what changes within a step, assumed."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most."""

    state: dict[str, int]
    """What is there all the time, by part: exact."""
    phases: dict[str, dict[str, int]]
    """What each phase of the run needs beside that, by part."""
    fixed: int
    keeper_bytes_per_node: int
    """Host memory for the node's own snapshots and its buddy's, both double-buffered, and for copies of the node's own
    on their way to storage."""

    @property
    def worst_phase(self) -> str:
        """Return the phase that needs most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Return the bytes of the worst moment; on a CPU beside what the process has before it builds the engine."""
        return sum(self.state.values()) + sum(self.phases[self.worst_phase].values()) + self.fixed

    def parts(self) -> dict[str, int]:
        """Return what makes up the peak."""
        return {**self.state, **self.phases[self.worst_phase], "context and libraries": self.fixed}


def memory_of(
    layout: Layout,
    micro: MicroBatch,
    train: TrainConfig,
    optim: OptimConfig,
    kind: str,
    ranks_per_node: int,
) -> Memory:
    """Return the memory of the rank that holds most.

    Args:
        layout: of the parameters.
        micro: what a micro-batch takes.
        train: batch and length.
        optim: the optimizer's settings.
        kind: `cpu` or `cuda`.
        ranks_per_node: that share a keeper.
    """
    ranks, itemsize = layout.groups[0].layout.world_size, dtype_on(kind, train.precision).itemsize
    settings = deepspeed_config(train, optim, kind, layout.parameters)
    flat = itemsize * layout.partition * ranks
    parameters = itemsize * layout.parameters
    partition = itemsize * layout.partition
    bucket = itemsize * settings["zero_optimization"]["reduce_bucket_size"]
    state = {
        "weights": flat + layout.buffer_bytes,
        "master weights": 4 * layout.partition,
        "optimizer state": layout.state_bytes - 4 * layout.partition,
    }
    several, own = train.slots > ranks, parameters
    blocks = micro.blocks_beside_gradients if several else micro.blocks
    backward = {"gradients": parameters, "activations and logits": micro.peak - parameters}
    if several:  # All gradients are there while the next micro-batch runs.
        backward["activations and logits"] = micro.peak_beside_gradients
    if itemsize == 2 and train.accumulate == "fp32":
        backward["gradients"] = parameters = 4 * layout.parameters
    some = {0, ranks // 2, ranks - 1}
    whole = itemsize * max(layout.whole_in_partition(rank) for rank in some)
    fragment = max(piece.length for rank in some for group in layout.groups for piece in group.layout.fragments(rank))
    largest = max(group.layout.partition for group in layout.groups)
    # The gradients leave for the bucket; packed for their owners they are gone before an owner keeps its own.
    reduction = {"gradients": parameters, "reduction bucket": bucket}
    reduction["partition's gradients"] = max(whole, partition if ranks > 1 else 0)
    held, in_place = whole, train.gradients == "partitioned" and itemsize == 2
    if train.gradients == "partitioned":
        # Each gradient is gone once it is in the bucket. In bf16 the parts are summed up in place, in fp32; in fp32
        # each micro-batch's are added to the last ones', all of those parameters of which the rank holds anything.
        blocks = micro.blocks_of_bucket
        before = 4 * layout.partition if in_place else whole * several
        backward = {"partition's gradients": before, "activations and logits": micro.peak_beside_gradients}
        packed = partition + 4 * fragment if in_place else partition * (ranks > 1)
        reduction = {"partition's gradients": before, "reduction bucket": bucket}
        reduction["packed, or kept beside them"] = max(packed, 0 if in_place else whole)
        held = before if in_place else whole
    norm = {"partition's gradients": held, "a gradient in fp64": 8 * fragment}
    update = {"partition's gradients": held, "gradients in fp32": 0 if in_place else 4 * largest}
    if kind == "cuda":
        # A CPU finds its pages when it is written, after the backward pass. Two are filled in turns, where one is sent.
        backward["reduction bucket"] = bucket * (2 if train.overlap and ranks > 1 else 1)
        update["gradients in fp32"] += itemsize * largest
        update["orthogonalization"] = workspace_bytes(layout.plan, optim, kind) if layout.plan else 0
    else:
        # What the heap has grown to is there in every phase, large blocks come and go beside it.
        backward["activations and logits"] = blocks.small + blocks.large - own
        if train.gradients == "partitioned":  # A bucket that holds fewer than all takes less.
            backward["reduction bucket"] = own
        for phase in (reduction, norm, update):
            phase.pop("gradients", None)
            room = blocks.heap - blocks.small
            for name, nbytes in phase.items():  # Small blocks come from what is kept, and large ones that it had.
                if nbytes <= room or nbytes < HEAP_BLOCK:
                    phase[name], room = 0, room - nbytes * (nbytes >= HEAP_BLOCK)
            phase["kept by the allocator"] = blocks.heap
    # The model is made in fp32. A GPU's is cast before it is laid out flat; master weights and state come after.
    made = 4 * layout.parameters + (flat if kind == "cpu" else 0)
    build = {"the model in fp32, beside all that": max(0, made - sum(state.values()))}
    phases = {"backward": backward, "reduction": reduction, "norm": norm, "update": update}
    for parts in phases.values():
        changing = sum(parts.values()) if kind == "cuda" else blocks.heap
        parts["fragmented"] = int(FRAGMENTED[kind] * changing)
    phases["build"] = build  # In large blocks, before anything is freed.
    copies = ranks_per_node if ranks > ranks_per_node else 0
    kept = sum(keeper.memory_of(ranks_per_node, copies, layout.snapshot.values))
    return Memory(state, phases, FIXED_BYTES[kind], kept)


def workspace_bytes(plan: OrthogonalizePlan, optim: OptimConfig, kind: str) -> int:
    """Return the memory of Newton-Schulz and of the straddlers' pieces on the rank that needs most."""
    size, wire = (dtype_on(kind, of).itemsize for of in (optim.ns_dtype, optim.wire_dtype))

    def of_batch(count: int, rows: int, columns: int) -> int:
        return size * sum(map(math.prod, workspace_shapes(count, rows, columns)))

    need = [0] * len(plan.local)
    for rank, batches in enumerate(plan.local):
        largest = (of_batch(next(cut(batch, kind)).count, batch.rows, batch.columns) for batch in batches)
        need[rank] = max(largest, default=0)
    for rank, elements in enumerate(plan.elements_sent()):
        need[rank] += 2 * wire * elements
    for matrix in plan.straddlers:  # Gathered in fp32, and the result is kept until it is sent.
        need[matrix.owner] += 4 * matrix.rows * matrix.columns + of_batch(1, matrix.rows, matrix.columns)
    return max(need)
