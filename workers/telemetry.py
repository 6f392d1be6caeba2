"""What is measured of the training itself, at an interval: where a step's time goes, how large updates, weights and
attention logits are, how rich the matrices' spectra, how even the experts' load; and a profiler's trace.

Every rank measures its share; sums meet in one small all-reduce, on the steps that are due alone. The names of what is
measured are those of the MLflow metrics (docs/telemetry.md).
"""

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from optim.spectra import svd_entropy
from workers.config import ModelConfig
from workers.engine import Engine
from workers.gpus import peak_tflops
from workers.models import build
from workers.models.attention import take_logits, watch
from workers.models.language_model import KINDS, MATRICES
from workers.objective import batch_of, summed_loss
from workers.recipe import TrainConfig
from workers.reports import Profiled
from workers.task import Task
from workers.traffic import COLLECTIVES, Traffic

CHUNK = 1 << 24
"""Elements that are measured at once."""


class StepClock:
    """Where the seconds of a step go, part after part; it stands still, at no cost, unless it is started."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] | None = None
        self._part, self._since = "", 0.0

    def start(self) -> None:
        """Begin to measure."""
        self.seconds, self._part = {}, ""

    def part(self, name: str) -> None:
        """End the last part and begin another; "" for none. A GPU is waited for: its work belongs to the part."""
        if self.seconds is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._part:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = name, now

    def stop(self) -> dict[str, float]:
        """Return what was measured."""
        self.part("")
        seconds, self.seconds = self.seconds or {}, None
        return seconds


class Telemetry:
    """One rank's part in what is measured.

    Args:
        task: what is measured, how often, and in the training of what.
        engine: whose model and optimizer are measured.
        tick: called between parts of long work, to give a sign of life.
        report: takes a report's class and its fields.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine,
        tick: Callable[[], None],
        report: Callable[..., None],
    ) -> None:
        self.config, self.engine, self.tick, self.report = task.telemetry, engine, tick, report
        self.clock = StepClock(engine.device)
        self.kinds = engine.model.parameter_kinds()
        self.clips = engine.optimizer.config.qk_clip > 0
        warm_up(task, engine)
        self.due = False
        self.profiler: torch.profiler.profile | None = None
        self.recipe, self._stage = task.recipe, task.recipe.at(1)
        self.flops_per_sequence = task.train.seq_len * engine.model.flops_per_token(task.train.seq_len)
        self._logits = take_logits(engine.model)
        self._before: list[Tensor] = []
        self._traffic, self._counts = Traffic(), False
        watch(engine.model, self.clips)
        # DeepSpeed calls the optimizer once for each group, between its reduction and its all-gather.
        engine.optimizer.register_step_pre_hook(lambda *_: self.clock.part("optimizer"))
        engine.optimizer.register_step_post_hook(lambda *_: self.clock.part("gather"))

    def begin(self, step: int) -> None:
        """Get ready for a step."""
        config = self.config
        self.due = bool(config.every and step % config.every == 0)
        if self._stage is not (stage := self.recipe.at(step)):  # With another batch, other traffic.
            self._stage, self._traffic = stage, Traffic()
        self._counts = self.due and not self._traffic.calls
        if self.due:
            self.clock.start()
            watch(self.engine.model, True)
        if self.engine.rank == 0 and step == config.profile_step:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def before_update(self) -> None:
        """Agree on the attention logits, for QK-Clip, and keep what the update will be measured by."""
        if not (self.clips or self.due):
            return
        self._logits = take_logits(self.engine.model)
        self.engine.optimizer.max_logits = self.engine.all_reduce(self._logits.largest, ReduceOp.MAX).tolist()
        if self.due:
            self.clock.part("")
            # On the host: a GPU may have no room for another copy of its weights.
            self._before = [state.tensors["weight"].to("cpu", copy=True) for state in self._flat_state()]

    def counting(self) -> AbstractContextManager:
        """Count what is sent within, in one step: it is the same in each, and counting slows everything within."""
        return self._traffic if self._counts else nullcontext()

    def after_update(self, lr: float) -> dict[str, float]:
        """Return what was measured of the step, the same on every rank; nothing where it was not due, or skipped."""
        due, self.due = self.due, False
        seconds = self.clock.stop()
        try:
            if not due or self.engine.zero.overflow:
                return {}
            return self._measured(seconds, lr)
        finally:
            self._before = []
            watch(self.engine.model, self.clips)

    def profiled(self, step: int) -> None:
        """End the profile where this was its last step, and tell of it."""
        if self.profiler is None or step < self.config.profile_step + self.config.profile_steps - 1:
            return
        profiler = self.close()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json.gz"
            profiler.export_chrome_trace(str(trace))
            self.report(Profiled, step=step, trace=trace.read_bytes())

    def close(self) -> Any:
        """Stop the profiler, of which a process has but one, and return it; None where there is none."""
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler

    def _measured(self, seconds: dict[str, float], lr: float) -> dict[str, float]:
        self.tick()
        self.engine.settle()
        squares, spectra = self._squares(lr), self._spectra()
        peak = self.config.peak_tflops or peak_tflops(self.engine.device)
        scalars = torch.tensor([self._logits.large.item(), self._logits.queries, peak], dtype=torch.float64)
        sent = torch.tensor([self._traffic.sent[name] for name in COLLECTIVES], dtype=torch.float64)
        (large, queries, peak), sent, squares, spectra = self._sums(scalars, sent, squares, spectra)

        found = {f"seconds/{part}": spent for part, spent in seconds.items()}
        found["mfu"] = self._stage.global_batch * self.flops_per_sequence / sum(seconds.values()) / (peak * 1e12)
        found["attention/max_logit"] = max(self.engine.optimizer.max_logits)
        found["attention/share_above_100"] = large / queries
        if not self._traffic.uncounted:
            totals = zip(COLLECTIVES, sent, strict=True)
            found |= {f"bytes_sent/{name}": total / self.engine.world_size for name, total in totals if total}
        for kind, (update, weight, count) in zip(KINDS, squares, strict=True):
            if count:
                found[f"weight_rms/{kind}"] = math.sqrt(weight / count)
            if count and lr:
                found[f"update_rms/{kind}"] = math.sqrt(update / count)
        for kind, (entropy, count) in zip(MATRICES, spectra, strict=True):
            if count:
                found[f"svd_entropy/{kind}"] = entropy / count
        return found

    def _sums(self, *mine: Tensor) -> list[Any]:
        """Sum tensors over all ranks at once, and return them as nested lists."""
        sums = self.engine.all_reduce(torch.cat([part.flatten() for part in mine]))
        parts = sums.split([part.numel() for part in mine])
        return [part.view_as(shape).tolist() for part, shape in zip(parts, mine, strict=True)]

    def _squares(self, lr: float) -> Tensor:
        """Sum the squares of updates (over `lr`, without decay) and weights: `[kinds, 3]`, with counts."""
        device = self.engine.device
        sums = torch.zeros(len(KINDS), 3, dtype=torch.float64, device=device)
        rows = {kind: row for row, kind in enumerate(KINDS)}
        optimizer = self.engine.optimizer
        decay = lr * optimizer.config.weight_decay
        for before, state in zip(self._before, self._flat_state(), strict=True):
            for fragment in state.fragments:
                row = sums[rows[self.kinds[fragment.name]]]
                kept = 1 - decay * optimizer.parametrization.decay(fragment.name)
                for first in range(fragment.offset, fragment.offset + fragment.length, CHUNK):
                    last = min(first + CHUNK, fragment.offset + fragment.length)
                    now = state.tensors["weight"][first:last]
                    update = (before[first:last].to(device) * kept - now) / (lr or 1.0)
                    counted = now.new_tensor(last - first, dtype=torch.float64)
                    row += torch.stack(
                        [update.square().sum(dtype=torch.float64), now.square().sum(dtype=torch.float64), counted]
                    )
        return sums.cpu()

    def _spectra(self) -> Tensor:
        """Sum the entropies of this rank's share of the matrices: `[spectra, 2]`, with their number.

        Every rank has all weights in its module, so nothing has to travel.
        """
        sums = torch.zeros(len(MATRICES), 2, dtype=torch.float64)
        for index, (kind, matrix) in enumerate(self._matrices()):
            if index % self.engine.world_size == self.engine.rank:
                self.tick()
                if (entropy := svd_entropy(matrix)) is not None:
                    sums[MATRICES.index(kind)] += torch.tensor([entropy, 1.0], dtype=torch.float64)
        return sums

    def _matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the hidden matrices, and of a layer's experts so many as are asked for, evenly spread."""
        for name, parameter in self.engine.model.named_parameters():
            if (kind := self.kinds[name]) not in MATRICES or not self.config.spectra:
                continue
            stack = parameter.detach().view(-1, *parameter.shape[-2:])
            every = max(1, len(stack) // self.config.spectra)
            yield from ((kind, matrix) for matrix in stack[::every][: self.config.spectra])

    def _flat_state(self) -> Iterator:
        return self.engine.optimizer.flat_state(self.engine.rank)


def warm_up(task: Task, engine: Engine) -> None:
    """Compile the attention that the task's model will need: in a step that would be taken for a hang.

    Args:
        task: what will be trained.
        engine: any on the device, in the precision and with the optimizer's settings of the training.
    """
    watches = task.telemetry.every or engine.optimizer.config.qk_clip
    masked = task.data.masks_documents
    if engine.device.type != "cuda":
        return
    dtype = next(engine.model.parameters()).dtype
    if watches:
        _compile_attention(task.model, task.train, dtype, engine.device, masked, watched=True)
    if masked:
        _compile_attention(task.model, task.train, dtype, engine.device, masked, watched=False)


def cool_down() -> None:
    """Forget what was compiled ahead, with what torch has compiled."""
    _compile_attention.cache_clear()


@functools.cache
def _compile_attention(
    config: ModelConfig, train: TrainConfig, dtype: torch.dtype, device: torch.device, masked: bool, watched: bool
) -> None:
    model = build(config.shallow(), initialize=False).to(device, dtype)
    watch(model, watched)
    tokens = torch.zeros(train.micro_batch, train.seq_len + 1, dtype=torch.int64, device=device)
    batch = batch_of(tokens, documents=tokens.int() if masked else None)
    summed_loss(model(*batch.given), model.head, batch.targets).backward()
    if masked and not watched:  # A validation's attention is a kernel of its own.
        with torch.no_grad():
            model.eval()(*batch.given)


def expert_load(load: Tensor) -> dict[str, float]:
    """Return the largest and the smallest load of an expert over its layer's mean, and the share of idle experts."""
    if not load.numel():
        return {}
    relative = load / load.mean(1, keepdim=True).clamp(min=1)
    return {
        "expert_load/max": relative.max().item(),
        "expert_load/min": relative.min().item(),
        "expert_load/idle": (load == 0).double().mean().item(),
    }
