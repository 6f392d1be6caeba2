"""One process's part of DeepSpeed: the process group, the ZeRO-1 engine around a fresh model, and their end.

A generation builds all of it anew: `deepspeed.initialize` on a module that had an engine before would keep the old
one alive through its hooks.
"""

import gc
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optim.config import OptimConfig
from optim.zero1 import Zero1Optimizer
from workers.config import ModelConfig
from workers.gather import Gather
from workers.lean import deepspeed, groups, import_compiler
from workers.models import LanguageModel, build
from workers.models.compiled import compile_layers
from workers.models.recompute import recompute
from workers.recipe import TrainConfig
from workers.settings import deepspeed_config, overlapped

# The CPU backend would compile a shared-memory op with g++ at the first start (a minute on two cores), and that op
# spins for ever when a peer dies. Gloo alone starts at once and raises.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
if torch.cuda.is_available():  # A GPU's kernels are compiled.
    import_compiler()

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
CONNECT_TIMEOUT = timedelta(seconds=3)


@dataclass(frozen=True)
class Engine:
    """The engine and what raymuon needs of its parts."""

    engine: Any
    model: LanguageModel
    optimizer: Zero1Optimizer
    device: torch.device
    rank: int
    world_size: int
    gather: Gather | None = None
    """Of the weights, where that is under the forward pass; else it is part of DeepSpeed's step."""

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO wrapper around our optimizer."""
        return self.engine.optimizer

    def all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Sum `values` over all ranks, or combine them as `op` says."""
        on_device = values.to(self.device)
        dist.all_reduce(on_device, op)
        return on_device.cpu()

    def publish_weights(self) -> None:
        """Bring the fp32 master weights into every rank's module, after they were loaded."""
        self.zero.update_lp_params()
        if self.gather:
            self.gather.start()

    def accumulates(self, last: bool) -> None:
        """Say before a backward pass whether it is the step's last: overlapped whole gradients leave during that."""
        if self.engine.managed_gradient_accumulation():
            self.engine.set_gradient_accumulation_boundary(last)

    def step(self) -> None:
        """Reduce what is not yet reduced, update, and send the weights to everybody."""
        self.engine.step()
        if self.gather:
            self.gather.start()

    def settle(self) -> None:
        """Wait for all weights, before somebody looks at them outside of a forward pass."""
        if self.gather:
            self.gather.finish()

    def abort(self) -> None:
        """Wake a thread that waits in a collective for a lost peer. Gloo's wakes by itself."""
        if self.device.type == "cuda":
            dist.distributed_c10d._abort_process_group()

    def destroy(self) -> None:
        """Take the engine down. Then drop every reference to it and call `leave_process_group`."""
        with suppress(RuntimeError):  # What a lost peer has not sent.
            self.settle()
        self.engine.destroy()


def leave_process_group() -> None:
    """Take down whatever process group there is, whole or half built, and all that DeepSpeed remembers of it.

    Gloo's sockets close with the last reference to their groups, and peers that wait for us go on only then. An engine
    that is still referenced keeps its groups: let go of it first.
    """
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    # Torch counts groups to name them and starts anew only when it destroys one. After a failed start the names would
    # differ from the peers', and everybody would wait for the others for ever.
    dist.distributed_c10d._world.group_count = 0
    deepspeed.comm.comm.cdb = None
    groups._WORLD_GROUP = None
    gc.collect()


def default_device() -> torch.device:
    """Return this process's GPU where there is one, the CPU otherwise."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def join_process_group(rank: int, world_size: int, store: dist.Store, device: torch.device) -> None:
    """Form the process group of a generation over a store that its rank 0 holds."""
    # DeepSpeed and libraries under it look at these even where a process group exists.
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    # All meet in the store first, whose end wakes everybody. Only then gloo connects each to each, which takes a moment
    # and must not take longer: whoever waits there for a peer that has died is woken by nothing.
    store.set(f"here/{rank}", "")
    store.wait([f"here/{peer}" for peer in range(world_size)], COLLECTIVE_TIMEOUT)
    gloo = device.type != "cuda"
    dist.init_process_group(
        "gloo" if gloo else "nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=CONNECT_TIMEOUT if gloo else COLLECTIVE_TIMEOUT,
    )
    if gloo:
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, dist.group.WORLD)
    adopt_process_group()


def adopt_process_group() -> None:
    """Let DeepSpeed use the process group that is there."""
    deepspeed.init_distributed(dist_init_required=False)


def build_engine(
    model_config: ModelConfig,
    optim_config: OptimConfig,
    train: TrainConfig,
    seed: int | None,
    device: torch.device,
) -> Engine:
    """Make a fresh model and wrap it; the process group must be there.

    The initial weights depend on the seed alone: they are drawn on the CPU, on every rank alike. Without a seed they
    are left as they are, for a state that is loaded over them.
    """
    if seed is not None:
        torch.manual_seed(seed)
    model = build(model_config, initialize=seed is not None, optim=optim_config).to(device)
    if train.compile:
        compile_layers(model, watched=optim_config.qk_clip > 0)
    recompute(model, train.recomputed(len(model.blocks)))
    parts = model.matrix_parts(optim_config.split)
    optimizer = Zero1Optimizer(
        model.named_parameters(),
        optim_config,
        model.tables(),
        parts,
        model.head_rows(),
        model.parametrization(optim_config),
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(train, optim_config, device.type, sum(p.numel() for p in model.parameters())),
        dist_init_required=False,
    )
    optimizer.bind(engine.optimizer)
    if train.gradients != "partitioned" and train.accumulate == "fp32":
        for parameter in model.parameters():
            if parameter.dtype != torch.float32:  # Autograd's own: what is added to it, it casts first.
                parameter.grad_dtype = torch.float32
    rank, world_size = dist.get_rank(), dist.get_world_size()
    overlaps = world_size > 1 and overlapped(train, device.type)
    gather = Gather(engine.optimizer, model) if overlaps else None
    return Engine(engine, model, optimizer, device, rank, world_size, gather)
