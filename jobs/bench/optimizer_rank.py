"""One rank of `bench optimizer`: the same model under several optimizers, a step of each in turns.

Started as `torchrun -m jobs.bench.optimizer_rank CONFIG.yaml ROUNDS`; rank 0 prints what came out as JSON. A step is
timed from a barrier to a barrier, so it takes as long as the slowest rank's.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import rendezvous

from jobs.load import load
from jobs.tell import tell
from optim.routing import parameter_groups
from optim.zero1 import Zero1Optimizer
from orchestrator.config import RunConfig
from workers.engine import build_engine, deepspeed, default_device, join_process_group
from workers.models import LanguageModel, build
from workers.objective import Batch, batch_of, summed_loss
from workers.settings import deepspeed_config

WARMUP = 3
"""Rounds that are not counted: in them DeepSpeed's Muon is compiled."""
FLOOR_REPEATS = 5
ERROR_MATRICES = 12
MUON = "deepspeed.runtime.zero.muon"
MATRICES_ON_GPU = 8
"""At a time when the floor is measured."""


class Nothing(torch.optim.Optimizer):
    """Does nothing: what is left of a step is everything but the optimizer."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Leave the parameters alone."""


def main(config_path: str, rounds: int) -> None:
    """Measure as one rank of a torchrun group."""
    config = load(config_path, [])
    store, rank, world_size = next(rendezvous("env://"))
    device = default_device()
    join_process_group(rank, world_size, store, device)
    torch.manual_seed(config.seed)
    tokens = torch.randint(0, config.model.vocab_size, (config.train.micro_batch, config.train.seq_len + 1))
    batch = batch_of(tokens).to(device)

    _compile_rival()
    engines: dict[str, Any] = {}
    refused: dict[str, str] = {}
    ours = build_engine(config.model, config.optim, config.train, config.seed, device)
    engines["raymuon"] = ours.engine
    for name, make in _rivals(config).items():
        try:
            engines[name] = make()
        except (ValueError, AssertionError) as error:
            refused[name] = str(error)

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(WARMUP + rounds):
        names = list(engines)
        for name in names[:: -1 if round_ % 2 else 1]:
            taken = _step(engines[name], batch)
            if round_ >= WARMUP:
                seconds[name].append(taken)
    result = {
        "median_step_ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "median_ms": _costs(seconds),
        "refused": refused,
        "floor_ms": 1e3 * _floor(ours.optimizer, config),
        **_errors(ours.optimizer, config),
    }
    if rank == 0:
        tell(result)


def _compile_rival() -> None:
    """Have DeepSpeed's Muon as it comes, compiled: workers import it otherwise, as they do not use it."""
    for name in ("original_muon", "muon_optimizer"):
        importlib.reload(importlib.import_module(f"{MUON}.{name}"))


def _rivals(config: RunConfig) -> dict[str, Callable[[], Any]]:
    """Return what makes each engine; `nothing` and `nothing_bf16` are what the others are held against."""

    def engine(bf16: bool, optimizer: Callable[[LanguageModel], torch.optim.Optimizer] | None) -> Any:
        torch.manual_seed(config.seed)
        model = build(config.model).to(default_device())
        settings = deepspeed_config(
            config.train, config.optim, default_device().type, sum(p.numel() for p in model.parameters())
        )
        if bf16:  # With fp32 accumulation DeepSpeed takes its other wrapper.
            settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
            settings["zero_optimization"] = {"stage": 1}
        arguments: dict[str, Any] = {"model": model, "config": settings, "dist_init_required": False}
        if optimizer is not None:
            return deepspeed.initialize(**arguments, optimizer=optimizer(model))[0]
        for group in parameter_groups(model.named_parameters(), "muon", model.tables()):
            for parameter in group["params"]:
                parameter.use_muon = group["method"] == "muon"
        settings["optimizer"] = {"type": "Muon", "params": {"lr": config.optim.lr, "momentum": config.optim.momentum}}
        arguments["model_parameters"] = list(model.parameters())
        return deepspeed.initialize(**arguments)[0]

    def nothing(model: nn.Module) -> torch.optim.Optimizer:
        return Nothing(model.parameters())

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=config.optim.lr)

    return {
        "nothing": lambda: engine(False, nothing),
        "adamw": lambda: engine(False, adamw),
        "deepspeed_zero": lambda: engine(False, None),
        "nothing_bf16": lambda: engine(True, nothing),
        "deepspeed_bf16": lambda: engine(True, None),
    }


def _step(engine: Any, batch: Batch) -> float:
    _meet()
    clock = time.perf_counter()
    loss = summed_loss(engine(batch.inputs), engine.module.head, batch.targets)
    engine.backward(loss / batch.counted, scale_wrt_gas=False)
    engine.step()
    engine.module.clear_expert_load()
    _meet()
    return time.perf_counter() - clock


def _meet() -> None:
    """Wait until every rank, and its GPU, has come here."""
    dist.barrier()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _costs(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return each optimizer's median cost in ms: a step of it less the same round's step that does nothing."""
    costs = {}
    for name, times in seconds.items():
        base = seconds["nothing_bf16" if name.endswith("bf16") else "nothing"]
        if not name.startswith("nothing"):
            costs[name] = 1e3 * statistics.median(a - b for a, b in zip(times, base, strict=True))
    return costs


def _floor(optimizer: Zero1Optimizer, config: RunConfig) -> float:
    """Return the seconds of the slowest rank's products alone, all ranks measuring at the same time."""
    exchange, total = optimizer.exchange, 0.0
    assert exchange is not None
    measured: dict[tuple[int, int], float] = {}
    _meet()
    for rows, columns in exchange.plan.matrices(dist.get_rank()):
        short, long = sorted((rows, columns))
        if (short, long) not in measured:
            counts, kind = config.optim.products(short, long), {"device": exchange.device, "dtype": exchange.rule.dtype}
            measured[short, long] = (
                counts.outer * _product(short, long, short, **kind)
                + counts.inner * _product(short, short, long, **kind)
                + counts.square * _product(short, short, short, **kind)
            )
        total += measured[short, long]
    slowest = torch.tensor([total], device=exchange.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def _product(rows: int, inner: int, columns: int, **kind: Any) -> float:
    """Return the median seconds of one matrix product; a GPU does a batch of them at a time, to be busy."""
    cuda = kind["device"].type == "cuda"
    batch = MATRICES_ON_GPU if cuda else 1
    a, b = torch.randn(batch, rows, inner).to(**kind), torch.randn(batch, inner, columns).to(**kind)
    out = torch.empty(batch, rows, columns, **kind)
    repeats = max(1, min(1000, int((1e12 if cuda else 2e8) / (2 * batch * rows * inner * columns))))
    times = []
    for _ in range(FLOOR_REPEATS + 1):
        clock = time.perf_counter()
        for _ in range(repeats):
            torch.bmm(a, b, out=out)
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - clock) / (repeats * batch))
    return statistics.median(times[1:])


def _errors(optimizer: Zero1Optimizer, config: RunConfig) -> dict[str, Any]:
    """Return how far the singular values of results are from 1, ours and DeepSpeed's, on this run's own directions."""
    rival = importlib.import_module(f"{MUON}.original_muon")
    (shard,) = optimizer.param_groups[0]["params"]
    momentum = optimizer.state[shard]["momentum_buffer"]
    exchange = optimizer.exchange
    assert exchange is not None
    ours, theirs = [], []
    for batch in exchange.plan.local[dist.get_rank()][:ERROR_MATRICES]:
        matrix = momentum[batch.offset : batch.offset + batch.rows * batch.columns].view(batch.rows, batch.columns)
        ours.append(_rms_from_one(exchange.rule.orthogonalize(matrix)))
        theirs.append(_rms_from_one(rival.zeropower_via_gram_newtonschulz(matrix, steps=config.optim.ns_steps)))
    return {
        "orthogonality_error": {"raymuon": statistics.mean(ours), "deepspeed": statistics.mean(theirs)},
        "ns_dtype": {"raymuon": _name(exchange.rule.dtype), "deepspeed": _name(rival.ns_compute_dtype("gram"))},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rms_from_one(matrix: Tensor) -> float:
    return (torch.linalg.svdvals(matrix.double()) - 1).square().mean().sqrt().item()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
