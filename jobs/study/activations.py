"""How large a model's activations are after a few steps of training, and how far they have moved: with real engines."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import HashStore

from orchestrator.config import RunConfig, task_of
from workers.common.errors import TrainingError
from workers.data.corpus import Corpus
from workers.engine import Engine, build_engine, default_device, join_process_group, leave_process_group
from workers.feed import Feed, counted
from workers.models import LanguageModel
from workers.models.attention import CausalAttention
from workers.objective import Batch, gradient_weight, summed_loss
from workers.task import Place

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # It warns of an optimizer that is not its own.
ALONE = Place(generation=1, rank=0, world_size=1, host="", port=0, keepers=False)

Sizes = dict[str, tuple[float, float]]
"""By name: the root mean square of an activation, and of its change since the beginning."""


def sizes_after(corpora: tuple[Corpus, ...], steps: int, config: RunConfig) -> Sizes:
    """Train so many steps at the peak of the learning rate, in this process, and return how large what has become.

    Raises:
        TrainingError: an activation is not finite.
    """
    train = replace(config.train, compile=False, steps=max(steps, config.train.steps))
    task = task_of(replace(config, train=train), corpora, run_url="", attempt=1, manifest=None)
    join_process_group(0, 1, HashStore(), default_device())
    engine = build_engine(config.model, config.optim, train, config.seed, default_device())
    feed = Feed(task, ALONE)
    try:
        _, probe = next(feed.validation())
        before = seen(engine.model, probe.to(engine.device))
        for step in range(1, steps + 1):
            _train(engine, feed, step, config.optim.lr)
        after = seen(engine.model, probe.to(engine.device))
    finally:
        feed.close()
        engine.destroy()
        del engine
        leave_process_group()
    found = {name: (_rms(now), _rms(now - before[name])) for name, now in after.items()}
    if bad := [name for name, sizes in found.items() if not all(map(math.isfinite, sizes))]:
        raise TrainingError(f"{bad[0]} is infinite or NaN after {steps} step(s); lower optim.lr={config.optim.lr:g}")
    return found


def _train(engine: Engine, feed: Feed, step: int, lr: float) -> None:
    slots = feed.step(step)
    weight = gradient_weight(counted(slots), 1)
    for number, slot in enumerate(slots, start=1):
        batch = slot.batch.to(engine.device)
        engine.accumulates(number == len(slots))
        loss = summed_loss(engine.engine(*batch.given), engine.model.head, batch.targets)
        engine.engine.backward(loss * weight, scale_wrt_gas=False)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.step()
    engine.settle()
    engine.model.balance_experts(engine.model.expert_load())
    engine.model.clear_expert_load()


@torch.no_grad()
def seen(model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
    """Return what a model makes of a batch, by name: each layer's residual stream and attention logits, and logits."""
    found: dict[str, Tensor] = {}
    with _hooks(model, found):
        hidden = model(*batch.given)
    return found | {"logits": F.linear(hidden, model.head).float()}


@contextmanager
def _hooks(model: LanguageModel, found: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str, module: nn.Module, given: tuple, out: Tensor) -> None:
        found[name] = out.float()

    def attended(name: str, module: nn.Module, given: tuple) -> None:
        found[name] = _scores(*given[:2])

    attention = [module for module in model.modules() if isinstance(module, CausalAttention)]
    handles = [
        layer.register_forward_hook(partial(keep, f"residual stream {number}"))
        for number, layer in enumerate(model.blocks, start=1)
    ] + [
        module.register_forward_pre_hook(partial(attended, f"attention logits {number}"))
        for number, module in enumerate(attention, start=1)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return all logits of queries and keys, `[batch, heads, time, time]`."""
    keys = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    return torch.matmul(q.float(), keys.float().mT) * q.size(-1) ** -0.5


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
