"""The step loop of one rank, from its first step to the last, a pause or a fault.

A step: this rank's micro-batch slots forward and backward; DeepSpeed reduces, clips and calls the optimizer; then one
small all-reduce, the boundary. The boundary carries the loss sum, the token count, a non-finite flag, a pause flag and
the experts' load. Every rank gets the same sums, so every rank takes the same decision: to pause, to fail, to save.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.schedule import learning_rate
from workers.checkpoint.shards import write_shard
from workers.data.order import random_seed, samples_of_slot, slots_of_rank
from workers.data.tokens import TokenSplit
from workers.engine import Engine
from workers.errors import TrainingError
from workers.generate import generate
from workers.reports import Report, Sampled, ShardWritten, StepDone, Validated
from workers.state import Counters, local_state, shapes
from workers.storage import Store
from workers.task import Task

FINISHED, PAUSED = "finished", "paused"


@dataclass(frozen=True)
class Boundary:
    """What all ranks agree on after a step."""

    loss: float
    tokens: int
    finite: bool
    pause: bool
    expert_load: Tensor
    """Tokens per expert over the global batch, `[MoE layers, experts]`."""


class Trainer:
    """One rank's step loop.

    Args:
        task: what to train.
        engine: built and, on a resumed run, loaded.
        counters: where the run is; moved on with every step.
        report: takes every report's class and fields; must not block.
        pause: tells whether somebody asked this process to stop at the next boundary.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        counters: Counters,
        report: Callable[..., None],
        pause: Callable[[], bool] = lambda: False,
    ) -> None:
        self.task, self.engine, self.counters = task, engine, counters
        self.report, self.pause = report, pause
        corpus = task.corpus
        self.train_split = TokenSplit(corpus, corpus.train, task.train.seq_len)
        self.validation_split = TokenSplit(corpus, corpus.validation, task.train.seq_len)
        self.slots = slots_of_rank(task.train.slots, engine.world_size, engine.rank)
        self.ledger = _Ledger(task, engine.rank)
        self.saved_step = counters.step if task.manifest else -1

    def run(self) -> str:
        """Train until the last step (`finished`) or until somebody asks for a pause (`paused`); save either way.

        Raises:
            TrainingError: a loss or a gradient is not finite; that step changed no weight.
        """
        train, counters = self.task.train, self.counters
        if counters.step == 0:
            self._validate()
        outcome = FINISHED
        while counters.step < train.steps:
            started = time.perf_counter()
            step = counters.step + 1
            lr = learning_rate(self.task.optim, step, train.steps)
            loss_sum = self._forward_backward(step)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr
            self.engine.engine.step()
            boundary = self._boundary(loss_sum)
            if not boundary.finite:
                raise TrainingError(
                    f"step {step}: the loss or the gradient is not finite (loss {boundary.loss}); "
                    "the last checkpoint is good; lower optim.lr or look at the data of this step"
                )
            self.engine.model.balance_experts(boundary.expert_load, self.task.model.router_bias_rate)
            counters.step = step
            counters.tokens += boundary.tokens
            counters.applied_steps = self.engine.optimizer.applied_steps
            self._report_rank0(
                StepDone,
                step=step,
                loss=boundary.loss,
                lr=lr,
                grad_norm=float(self.engine.zero._global_grad_norm),
                tokens=counters.tokens,
                seconds=time.perf_counter() - started,
                expert_imbalance=_imbalance(boundary.expert_load),
            )
            if train.validate_every and step % train.validate_every == 0 and step < train.steps:
                self._validate()
            if self.task.checkpoint.every and step % self.task.checkpoint.every == 0 and step < train.steps:
                self._save()
            if boundary.pause and step < train.steps:
                outcome = PAUSED
                break
        if outcome == FINISHED:
            self._validate()
        self._save()
        if outcome == FINISHED and self.engine.rank == 0 and train.sample_prompt and train.sample_bytes:
            text = generate(self.engine.model, train.sample_prompt, train.sample_bytes, train.seq_len, self.task.seed)
            self._report_rank0(Sampled, text=text)
        return outcome

    def _forward_backward(self, step: int) -> Tensor:
        """Accumulate the gradient of this rank's slots and return their summed loss in nats, fp64 on the device."""
        train, engine = self.task.train, self.engine
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        global_tokens = train.global_batch * train.seq_len
        # A rank without a slot runs one of weight zero: the reduction needs a gradient from everybody.
        for slot in self.slots or [0]:
            indices = samples_of_slot(
                self.task.seed, step, slot, train.global_batch, train.micro_batch, self.train_split.num_samples
            )
            torch.manual_seed(random_seed(self.task.seed, step, slot))
            loss_sum = self._loss(engine.engine, self.train_split, indices)
            weight = engine.world_size / global_tokens if self.slots else 0.0  # DeepSpeed averages over the ranks.
            engine.engine.backward(loss_sum * weight, scale_wrt_gas=False)
            if self.slots:
                total += loss_sum.detach()
                self.ledger.add(step, slot, indices)
        if not self.slots:
            engine.model.clear_expert_load()
        return total

    def _loss(self, model: Any, split: TokenSplit, indices: list[int]) -> Tensor:
        """Return the summed cross-entropy of the samples, in nats."""
        tokens = torch.from_numpy(split.batch(indices)).to(self.engine.device)
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")

    def _boundary(self, loss_sum: Tensor) -> Boundary:
        model, train = self.engine.model, self.task.train
        load = model.expert_load()
        tokens = len(self.slots) * train.micro_batch * train.seq_len
        scalars = [loss_sum.item(), tokens, float(self.engine.zero.overflow), float(self.pause())]
        sums = self.engine.all_reduce(torch.cat([torch.tensor(scalars, dtype=torch.float64), load.flatten().cpu()]))
        model.clear_expert_load()
        loss, tokens, overflow, pause = sums[:4].tolist()
        mean = loss / tokens
        return Boundary(mean, int(tokens), mean - mean == 0 and not overflow, pause > 0, sums[4:].view(load.shape))

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the mean loss over the first held-out sequences, spread evenly; the same ones every time."""
        train, engine, split = self.task.train, self.engine, self.validation_split
        count = min(train.validate_sequences, split.num_samples)
        indices = [i * split.num_samples // count for i in range(count)]
        chunks = [indices[i : i + train.micro_batch] for i in range(0, count, train.micro_batch)]
        mine = [chunks[i] for i in slots_of_rank(len(chunks), engine.world_size, engine.rank)]
        engine.model.eval()
        total = sum(self._loss(engine.model, split, chunk).item() for chunk in mine)
        engine.model.train()
        loss = engine.all_reduce(torch.tensor([total], dtype=torch.float64)).item() / (count * train.seq_len)
        self._report_rank0(Validated, step=self.counters.step, loss=loss)

    def _save(self) -> None:
        """Write this rank's shard; the driver commits when every rank's has come."""
        step = self.counters.step
        if step == self.saved_step:
            return
        prefix = f"{step:08d}-{self.task.attempt:04d}-{self.engine.rank:05d}"
        shard = write_shard(Store(self.task.run_url), prefix, local_state(self.engine))
        self.report(ShardWritten, step=step, shard=shard, counters=self.counters.as_dict(), shapes=shapes(self.engine))
        self.saved_step = step

    def _report_rank0(self, kind: type[Report], **fields: Any) -> None:
        if self.engine.rank == 0:
            self.report(kind, **fields)


def _imbalance(load: Tensor) -> float:
    return (load.amax(1) / load.mean(1).clamp(min=1)).max().item() if load.numel() else 0.0


class _Ledger:
    """Writes down which samples this process trained on, one line a slot, for whoever wants proof."""

    def __init__(self, task: Task, rank: int) -> None:
        self.file = None
        self.attempt = task.attempt
        if task.data.ledger:
            folder = Path(task.data.ledger)
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / f"{task.attempt:04d}-{rank:05d}.jsonl").open("a", buffering=1)

    def add(self, step: int, slot: int, samples: list[int]) -> None:
        if self.file:
            line = {"attempt": self.attempt, "step": step, "slot": slot, "samples": samples}
            self.file.write(json.dumps(line) + "\n")
