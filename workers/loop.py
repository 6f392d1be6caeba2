"""The step loop of one rank in one generation, from the state it was given to the last step, a pause or a fault.

A step: this rank's micro-batch slots forward and backward; DeepSpeed reduces, clips and calls the optimizer; the shard
is copied into the keeper's memory; then one small all-reduce, the boundary. The boundary carries the loss sum, a
non-finite flag, a pause flag, whether the snapshot was written, the experts' load, and how many targets count in the
next step: a step's gradients are divided by that, so it has to be known before the first of them, and every rank reads
its part of a step while it trains on the one before. Every rank gets the same sums, so every rank takes the same
decision: to pause, to skip, to snapshot, to save.

No state counts that is not finite: the boundary tells of it before the snapshot of its step is agreed on, so that
neither a recovery nor a checkpoint can come from it.
"""

import math
import operator
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from workers.boundary import Boundary, Told, agree
from workers.common.errors import TrainingError
from workers.controls import Controls, Pause
from workers.data.order import random_seed
from workers.engine import Engine
from workers.feed import Feed, counted
from workers.generate import write_sample
from workers.models.attention import take_logits
from workers.objective import Batch, gradient_weight, summed_loss
from workers.phases import Phase
from workers.reports import Sampled, SaveFailed, SaveSkipped, StepDone, Validated
from workers.settings import overlapped
from workers.snapshots.schedule import SnapshotSchedule
from workers.snapshots.writer import SnapshotWriter
from workers.state import (
    Counters,
    first_not_finite,
    is_finite,
    replicated_tensors,
    shapes,
    shard_map,
    shard_tensors,
)
from workers.task import Place, Task
from workers.telemetry import Telemetry, expert_load

FINISHED, PAUSED = "finished", "paused"
SAVE_TRIES, SAVE_RETRY_S = 40, 0.5
ROWS_KEPT = 2000
"""Steps whose rows travel with a snapshot at most; the driver is never so far behind."""


class Trainer:
    """One rank's step loop; all ranks make theirs together.

    Args:
        task: what to train.
        member: this rank's place, and what is on record already.
        engine: built, and loaded where there was something to load.
        counters: where the run is; moved on with every step.
        controls: how it talks to whoever runs it.
    """

    def __init__(self, task: Task, member: Place, engine: Engine, counters: Counters, controls: Controls) -> None:
        self.task, self.member, self.engine, self.counters, self.controls = task, member, engine, counters, controls
        self.feed = Feed(task, member)
        self.validated, self.saved = member.validated, member.committed
        self.storage_keeps_up = True
        self.snapshot_step = -1
        checkpoint = task.checkpoint
        self.schedule = SnapshotSchedule(checkpoint.snapshot_every, checkpoint.snapshot_share, counters.step)
        self.snapshots = SnapshotWriter(
            controls.links,
            {"generation": member.generation, "rank": member.rank, "world_size": member.world_size},
            shard_map(engine, engine.world_size, engine.rank),
            shapes(engine) if engine.rank == 0 else {},
            controls.keeper_lost,
        )
        self.replicated = list(replicated_tensors(engine))  # Changed in place; looking them up walks the whole model.
        self.snapshot_seconds = 0.0
        tick = lambda: controls.mark(Phase.MEASURE, counters.step + 1)  # noqa: E731
        self.telemetry = Telemetry(task, engine, tick, controls.report)
        # What torch has compiled refuses to run where somebody looks at every op: its reductions go uncounted.
        within = task.train.gradients == "partitioned" or overlapped(task.train, engine.device.type)
        self.sends_within_passes = within and not task.train.compile
        self.validation: dict[str, Any] | None = None
        """The last one, which the driver may not have."""
        self.rows: deque[dict[str, Any]] = deque(maxlen=ROWS_KEPT)
        self.upcoming = self.feed.step(counters.step + 1)
        self.tokens = int(self._sum(counted(self.upcoming)))
        """Targets that count in the step that comes next, over all ranks."""

    def run(self) -> str:
        """Train until the last step (`finished`) or until somebody asks for a pause (`paused`).

        Raises:
            TrainingError: too many gradients in a row were not finite.
        """
        try:
            return self._run()
        finally:
            self.telemetry.close()
            self.feed.close()

    def _run(self) -> str:
        last_step = self.task.last_step
        self._duties()
        while self.counters.step < last_step:
            pause = self._step()
            self._duties(save=pause.save)
            if pause.leave and self.counters.step < last_step:
                self._snapshot()
                self.snapshots.close()
                return PAUSED
        self.snapshots.close()
        train = self.task.train
        if self.engine.rank == 0 and train.sample_prompt and train.sample_bytes and last_step == train.steps:
            progress = lambda: self.controls.mark(Phase.SAMPLE, last_step)  # noqa: E731
            text = write_sample(
                self.engine.model,
                self.task.corpora[0].open_tokenizer(),
                *(train.sample_prompt, train.sample_bytes, train.seq_len, self.task.seed, progress),
            )
            self.controls.report(Sampled, text=text)
        return FINISHED

    def _step(self) -> Pause:
        """Train one step and return what is asked of everybody after it."""
        counters, engine = self.counters, self.engine
        step, started = counters.step + 1, time.time()
        clock, part = time.perf_counter(), self.telemetry.clock.part
        lr = self.task.recipe.learning_rate(step)
        self.telemetry.begin(step)
        with self.telemetry.counting() if self.sends_within_passes else nullcontext():
            loss_sum = self._forward_backward(step)
        held_up = time.perf_counter()
        self.controls.mark(Phase.WAIT, step)
        part("snapshot")
        self.snapshots.wait()
        self.snapshot_seconds += time.perf_counter() - held_up
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        self.controls.mark(Phase.REDUCE, step)
        part("logits")
        self.telemetry.before_update()
        part("reduce")
        with self.telemetry.counting():
            engine.step()
        measured = self.telemetry.after_update(lr, self.tokens)
        cost, self.snapshot_seconds = self.snapshot_seconds, 0.0
        save = self.task.saves(step)
        keeps_up = not save or self.snapshots.idle()
        written = (save or self.schedule.due(step)) and self._write(Phase.SNAPSHOT, step)
        self.controls.mark(Phase.BOUNDARY, step)
        seconds = time.perf_counter() - clock - self.snapshot_seconds
        boundary = self._boundary(loss_sum, written, keeps_up, cost, seconds)
        self.storage_keeps_up = boundary.storage_keeps_up
        self._count(step, boundary)
        row = {
            "step": step,
            "loss": boundary.loss,
            "lr": lr,
            "grad_norm": float(engine.zero._global_grad_norm),
            "tokens": counters.tokens,
            "step_tokens": boundary.tokens,
            "seconds": time.perf_counter() - clock,
            "expert_imbalance": _imbalance(boundary.expert_load),
            "skipped": counters.skipped,
            "snapshot_every": self.schedule.chosen,
            "snapshot_seconds": boundary.snapshot_seconds,
            "data": {"data/wait_s": boundary.data_seconds, **self.feed.figures(step)},
            "measured": measured and {**measured, **expert_load(boundary.expert_load)},
        }
        # Every rank keeps the rows that the driver may not have: they go with the snapshot, so that none is lost with
        # the one rank that tells them.
        while self.rows and self.rows[0]["step"] <= self.controls.told():
            self.rows.popleft()
        self.rows.append({**row, "time": started + row["seconds"]})
        self.schedule.measure(step, boundary.snapshot_seconds, boundary.step_seconds)
        if written and boundary.snapshot:
            self._agree(Phase.AGREE, step)
        if engine.rank == 0:
            self.controls.report(StepDone, **row)
            self.telemetry.profiled(step)
        return boundary.pause

    def _forward_backward(self, step: int) -> Tensor:
        """Accumulate the gradient of this rank's slots and return their summed loss in nats, fp64 on the device.

        Raises:
            TrainingError: there is nothing to learn from in this step, on any rank.
        """
        engine, part = self.engine, self.telemetry.clock.part
        if not self.tokens:
            raise TrainingError(
                f"step {step}: none of the targets in its global batch counts, so there is nothing to learn from; "
                "look at the data of this step"
            )
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        weight = gradient_weight(self.tokens, engine.world_size)
        clock = time.perf_counter()
        for slot in self.upcoming:
            self.controls.mark(Phase.COMPUTE, step)
            torch.manual_seed(random_seed(self.task.seed, step, slot.number))
            part("forward")
            loss_sum = self._loss(engine.engine, slot.batch)
            part("backward")
            engine.accumulates(last=slot is self.upcoming[-1])
            engine.engine.backward(loss_sum * weight, scale_wrt_gas=False)
            self.telemetry.after_backward(slot.batch, self.tokens)
            total += loss_sum.detach()
            if slot.counts:
                self.feed.trained(step, slot)
            else:  # They come first: what was seen in them is forgotten.
                engine.model.clear_expert_load()
                take_logits(engine.model)
        part("forward")
        self.upcoming = self.feed.step(step + 1)
        self.feed.read_ahead(step + 2)
        self.controls.busy((time.perf_counter() - clock) / len(self.upcoming))
        return total

    def _loss(self, forward: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Return the summed loss of a batch through the engine or the model alone."""
        batch = batch.to(self.engine.device)
        hidden, chunked = forward(*batch.given), self.task.train.logits == "chunked"
        return summed_loss(hidden, self.engine.model.head, batch.targets, chunked)

    def _boundary(self, loss_sum: Tensor, written: bool, keeps_up: bool, cost: float, seconds: float) -> Boundary:
        engine, load = self.engine, self.engine.model.expert_load()
        pause = self.controls.pause()
        mine = Told(
            loss=loss_sum.item(),
            next_tokens=counted(self.upcoming),
            skipped=engine.zero.overflow,
            finite=is_finite(engine),
            leave=pause.leave,
            save=pause.save,
            snapshot=written,
            storage_keeps_up=keeps_up,
            snapshot_seconds=cost,
            step_seconds=seconds,
            data_seconds=self.feed.waited(),
        )
        boundary = agree(mine, self.tokens, load, engine.world_size, engine.all_reduce)
        engine.model.clear_expert_load()
        return boundary

    def _count(self, step: int, boundary: Boundary) -> None:
        """Move the counters on; every rank comes to the same.

        Raises:
            TrainingError: this was one bad step too many, or one that nobody skipped.
        """
        counters, limit = self.counters, self.task.train.max_skipped_in_a_row
        if not boundary.finite and (name := first_not_finite(self.engine)):
            raise TrainingError(f"step {step}: its update has made the {name} infinite or NaN; lower optim.lr")
        if boundary.skipped:
            counters.skipped += 1
            counters.skipped_in_a_row += 1
            if counters.skipped_in_a_row > limit:
                raise TrainingError(
                    f"step {step}: the gradient is not finite (loss {boundary.loss}), for the "
                    f"{counters.skipped_in_a_row}. time in a row; train.max_skipped_in_a_row={limit}. "
                    "Lower optim.lr or look at the data of these steps"
                )
        elif not math.isfinite(boundary.loss):
            raise TrainingError(f"step {step}: the loss is {boundary.loss} with a finite gradient; lower optim.lr")
        else:
            counters.skipped_in_a_row = 0
            self.engine.model.balance_experts(boundary.expert_load, self.task.recipe.at(step).router_bias_rate)
        counters.step = step
        counters.tokens += boundary.tokens
        self.tokens = boundary.next_tokens
        counters.applied_steps = self.engine.optimizer.applied_steps

    # -- snapshots, validation, checkpoints ----------------------------------------------------------------------------

    def _write(self, phase: Phase, step: int) -> bool:
        """Copy this rank's shard into the keeper's memory; tell whether that worked."""
        self.controls.mark(phase, step)
        clock = time.perf_counter()
        written = self.snapshots.write(step, shard_tensors(self.engine))
        self.snapshot_seconds += time.perf_counter() - clock
        return written

    def _agree(self, phase: Phase, step: int) -> None:
        """Complete the snapshot: every rank has written."""
        self.controls.mark(phase, step)
        clock = time.perf_counter()
        notes = {"counters": self.counters.as_dict(), "rows": list(self.rows), "validation": self.validation}
        self.snapshots.agree(self.replicated, notes)
        self.snapshot_step = step
        self.schedule.taken(step)
        self.snapshot_seconds += time.perf_counter() - clock

    def _snapshot(self) -> bool:
        """Take a snapshot of where the run is, if there is none yet; all ranks come here together."""
        step = self.counters.step
        if self.snapshot_step != step:
            self.controls.mark(Phase.SAVE, step)
            self.snapshots.wait()
            self._all(True)  # Nobody writes over the snapshot before the last until everybody's last has its copy.
            if self._all(self._write(Phase.SAVE, step)):
                self._agree(Phase.SAVE, step)
        return self.snapshot_step == step

    def _all(self, mine: bool) -> bool:
        """Tell whether every rank says yes."""
        return self._sum(mine) == self.engine.world_size

    def _sum(self, mine: float) -> float:
        """Return the sum of what each rank has."""
        return self.engine.all_reduce(torch.tensor([float(mine)], dtype=torch.float64)).item()

    def _duties(self, save: bool = False) -> None:
        """Do what belongs to this step and is not on record yet.

        After a fault the same question is asked again, so that neither a validation nor a checkpoint gets lost.
        """
        step = self.counters.step
        if self.task.validates(step) and step > self.validated:
            self._validate()
            self.validated = step
        if self.member.keepers and (save or self.task.saves(step)) and step > max(0, self.saved):
            self._save(step, must=save or self.task.always_saves(step))
            self.saved = step

    def _save(self, step: int, must: bool) -> None:
        """Have this step's snapshot written to storage, unless storage is slower than checkpoints come.

        One that must always goes, and waits for a lost keeper to be replaced; another is left out.
        """
        if not must and not self.storage_keeps_up:
            if self.engine.rank == 0:
                self.controls.report(SaveSkipped, step=step)
            return
        for _ in range(SAVE_TRIES if must else 1):
            if self._snapshot():
                self.snapshots.save(self.task.run_url, self.task.attempt)
                return
            time.sleep(SAVE_RETRY_S)
        self.controls.report(SaveFailed, step=step, error="no snapshot to save: a keeper is missing")

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the mean loss over each source's held-out sequences.

        Raises:
            TrainingError: one is not finite, or nothing counts.
        """
        engine, feed, step = self.engine, self.feed, self.counters.step
        engine.model.eval()
        totals, tokens = [0.0] * len(feed.sources), [0] * len(feed.sources)
        for source, batch in feed.validation():
            self.controls.mark(Phase.VALIDATE, step)
            totals[source] += self._loss(engine.model, batch).item()
            tokens[source] += batch.counted
        self.controls.mark(Phase.VALIDATE, step)
        engine.model.train()
        sums = engine.all_reduce(torch.tensor([*totals, *tokens], dtype=torch.float64)).tolist()
        losses = []
        for name, total, count in zip(feed.sources, sums, sums[len(totals) :], strict=False):
            of = f" of source {name}" if name else ""
            if not count:
                raise TrainingError(
                    f"step {step}: none of the targets in the held-out sequences{of} counts, so there is no "
                    "validation loss; look at the held-out data, or raise train.validate_sequences"
                )
            losses.append(total / count)
            if not math.isfinite(losses[-1]):
                raise TrainingError(f"step {step}: the validation loss{of} is {losses[-1]}; lower optim.lr")
        loss = _mean(losses, feed.validation_weights)
        told = {
            "step": step,
            "loss": loss,
            "by_source": {name: one for name, one in zip(feed.sources, losses, strict=True) if name},
            # The weights are of tokens: so many bits in so many bytes of the mixture.
            "bits_per_byte": loss / math.log(2) / _mean(feed.bytes_per_token, feed.validation_weights),
        }
        self.validation = {**told, "time": time.time()}
        if engine.rank == 0:
            self.controls.report(Validated, **told)


def _mean(values: list[float], weights: list[float]) -> float:
    """Return the mean by weight; of a single value itself."""
    if len(values) == 1:
        return values[0]
    return math.fsum(map(operator.mul, values, weights)) / math.fsum(weights)


def _imbalance(load: Tensor) -> float:
    return (load.amax(1) / load.mean(1).clamp(min=1)).max().item() if load.numel() else 0.0
