"""One generation in one process: join the group, build the engine, take the state, train."""

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore

from workers.checkpoint.shards import CheckpointReader
from workers.common.errors import DamagedError, StorageError, TrainingError
from workers.common.heap import trim
from workers.config import MoonlightConfig
from workers.controls import Controls
from workers.engine import Engine, build_engine, default_device, join_process_group, leave_process_group
from workers.lean import import_compiler
from workers.loop import Trainer
from workers.models.compiled import compile_ahead
from workers.objective import batch_of, gradient_weight, summed_loss
from workers.phases import Phase
from workers.reports import CheckpointDamaged, Planned, Restored
from workers.snapshots.reader import SnapshotReader
from workers.state import Counters, WeightsOnly, first_not_finite, load_state, overlapping, shard_map
from workers.task import Place, Task
from workers.telemetry import cool_down, warm_up


def join(member: Place, task: Task, rendezvous: dist.Store | None = None) -> Engine:
    """Become a member of a generation: join its process group and build an engine.

    Args:
        member: this process's rank, and where the rendezvous is.
        task: what will be trained.
        rendezvous: the store, where it is not the one that `member` names.
    """
    store = rendezvous or TCPStore(member.host, member.port, member.world_size, is_master=False)
    device = default_device()
    join_process_group(member.rank, member.world_size, store, device)
    fresh = member.snapshot is None and task.manifest is None and task.origin is None
    engine = build_engine(task.model, task.optim, task.train, task.seed if fresh else None, device)
    if task.train.compile:
        train, watched = task.train, task.optim.qk_clip > 0
        compile_ahead(engine.model, train.micro_batch, train.seq_len, task.data.masks_documents, watched)
    return engine


def train(engine: Engine, task: Task, member: Place, controls: Controls) -> tuple[str, int]:
    """Take the state, train, and return the outcome and the last finished step.

    Raises:
        TrainingError: the state is not finite, or too many steps were not.
        DamagedError: the checkpoint is not what was written; it is reported, too.
        StorageError: the checkpoint, a snapshot or the data could not be read.
    """
    controls.mark(Phase.RESTORE, -1)
    try:
        # A large checkpoint takes its time: every read shows that it gets on.
        counters, storage_bytes = take_state(engine, task, member, lambda: controls.mark(Phase.RESTORE, -1))
    except DamagedError as error:
        controls.report(CheckpointDamaged, step=task.manifest.step if task.manifest else 0, error=str(error))
        raise
    if name := first_not_finite(engine):
        begins = task.origin is not None and counters.step == 0
        start = f"train.init={task.train.init}" if begins else f"the state of step {counters.step}"
        raise TrainingError(f"{start} cannot be trained on from: its {name} is infinite or NaN; take an earlier one")
    controls.report(Restored, step=counters.step, storage_bytes=storage_bytes)
    if engine.rank == 0 and member.tell_plan:
        itemsize = next(engine.model.parameters()).element_size()
        if (figures := engine.optimizer.plan_figures(itemsize)) is not None:
            controls.report(Planned, figures=figures.as_dict())
    return Trainer(task, member, engine, counters, controls).run(), counters.step


def take_state(
    engine: Engine, task: Task, member: Place, progress: Callable[[], None] = lambda: None
) -> tuple[Counters, int]:
    """Fill the engine from the snapshot, else from the checkpoint, else from the origin, else leave it as it is.

    Args:
        engine: of this rank.
        task: what will be trained.
        member: this process's rank, and the snapshot.
        progress: called after every read from storage.

    Returns:
        Where the run is, and how many bytes were read from storage.
    """
    checkpoint = None
    if task.manifest is not None:
        checkpoint = CheckpointReader(task.store(task.manifest_url or task.run_url), task.manifest, progress)
    if (snapshot := member.snapshot) is not None:
        rest = checkpoint if snapshot.saved else None
        maps, ranks = partial(shard_map, engine), overlapping(engine, snapshot.world_size)
        reader = SnapshotReader(snapshot, maps, ranks, member.links.keeper, rest)
        counters = Counters(**snapshot.counters)
        try:
            load_state(engine, reader, counters)
        except OSError as error:
            raise StorageError(f"snapshot of step {snapshot.step}: a keeper is gone ({error})") from error
        finally:
            reader.close()
        return counters, rest.bytes_read if rest else 0
    if checkpoint is not None:
        counters = Counters(**checkpoint.manifest.counters)
        load_state(engine, checkpoint, counters)
        return counters, checkpoint.bytes_read
    if task.origin is not None:
        origin = CheckpointReader(task.store(task.origin.run_url), task.origin.manifest, progress)
        counters, reader = Counters(), WeightsOnly(origin)
        if task.train.init_state == "all":  # AdamW's moments are corrected by the steps that made them.
            counters, reader = Counters(applied_steps=origin.manifest.counters["applied_steps"]), origin
        load_state(engine, reader, counters)
        return counters, origin.bytes_read
    return Counters(), 0


def forget() -> None:
    """Drop what is left of earlier runs in this process: what was compiled for their models, and memory that is free.

    Torch compiles the code of a layer so many times and no more, whatever the model: those of all runs would add up.
    """
    if "torch._dynamo" in sys.modules:  # Else nothing was compiled, and it would be imported for that.
        torch.compiler.reset()
    cool_down()
    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rehearse(task: Task) -> None:
    """Train one throw-away step of a tiny model alone: a process's first engine costs seconds after all imports.

    What a GPU has to compile for the run is compiled, too.
    """
    tiny = MoonlightConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
    )
    if task.train.compile:
        import_compiler()
    device = default_device()
    join_process_group(0, 1, HashStore(), device)
    optim = replace(task.optim, width_rule="none")  # So narrow a model may be beyond what the run's rule allows.
    engine = build_engine(tiny, optim, replace(task.train, seq_len=16, compile=False), 0, device)
    try:
        batch = batch_of(torch.zeros(1, 17, dtype=torch.int64, device=device))
        loss = summed_loss(engine.engine(batch.inputs), engine.model.head, batch.targets)
        engine.engine.backward(loss * gradient_weight(batch.counted, 1), scale_wrt_gas=False)
        engine.step()
        warm_up(task, engine)
        engine.destroy()
    finally:
        del engine
        leave_process_group()
