"""What becomes of everything that happens in a run: MLflow, the journal, and the person who watches."""

import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.record.events import DriverStarted, Elapsed, Event, Fault, Membership, Recovery, Tally
from orchestrator.record.journal import Alive, Journal, Row, read_journal
from orchestrator.record.metrics import NodeUsage, memory_saving
from orchestrator.record.report import DESCRIPTION, Links, describe, recovery_report
from orchestrator.record.result import RunResult
from orchestrator.record.start import Start
from orchestrator.record.watcher import Watcher
from workers.common.errors import StorageError
from workers.recipe import UNSAVING
from workers.reports import Planned, Profiled, Report, Restored, Sampled, StepDone, Validated

BULKY = ("config", "provenance")
"""Fields of events that stay in the journal alone."""
LOSSES_KEPT = 10_000
"""Steps whose losses wait for their checkpoint."""
RATE_TOLERANCE = 0.01
"""Relative difference of a learning rate that is not worth a word."""
HURRY_S = 2.0
"""How long a commit waits for MLflow to take the rows before it: the journal has them."""


class RunRecorder:
    """The record of one attempt at a run.

    Args:
        config: of the run.
        record: its MLflow run (an `orchestrator.record.tracking.RunRecord`, whose import takes seconds).
        journal: of this attempt.
        watcher: shows what happens.
        links: where everything of the run is.
        last_step: after which it ends.
        tally: what adds up.
        events: of earlier attempts.
        start: takes note of the parts of the start that a run's reports tell.
    """

    def __init__(
        self,
        config: RunConfig,
        record: Any,
        journal: Journal,
        watcher: Watcher,
        links: Links,
        last_step: int,
        tally: Tally,
        events: list[Event],
        start: Start,
    ) -> None:
        self.config, self.record, self.journal, self.watcher = config, record, journal, watcher
        self.links, self.last_step, self.tally, self.events = links, last_step, tally, events
        self.marks: dict[str, int] = record.marks
        self.val_loss: float | None = None
        self.val_bits_per_byte: float | None = None
        self.sample = ""
        self.checkpoint = ""
        self.start = start
        self._artifacts: list[threading.Thread] = []
        self._begun = False
        self._faults = sum(isinstance(event, Fault) for event in events)
        self._warned: str | None = None
        self._slow: set[int] = set()
        self._step = 0
        self._told_stage = ""
        self._memory: dict[str, float] = {}
        """How the generation saves memory, until its first step that is new tells it."""
        self._losses: dict[int, dict[str, float]] = {}
        """By step, until a checkpoint that is as new counts: it comes when its upload is done, steps later."""

    def step(self, report: StepDone, world_size: int) -> None:
        """Record a step, once."""
        self.start.end("validation", report.time - report.seconds)
        self.start.end("step", report.time)
        values = {
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "tokens": report.tokens,
            "tokens_per_second": report.step_tokens / report.seconds,
            "step_seconds": report.seconds,
            "world_size": world_size,
            "expert_imbalance": report.expert_imbalance,
            "skipped_steps": report.skipped,
            "snapshot_every": report.snapshot_every,
            "snapshot_seconds": report.snapshot_seconds,
            **report.data,
            **report.measured,
            **self._stage(report.step),
        }
        if report.step > self.marks["train"]:
            values, self._memory = {**values, **self._memory}, {}
        self._step = report.step
        self._note_loss(report.step, "loss", report.loss)
        self._row("train", report.step, report.time, values)
        self.watcher.report(report)
        if self.record.failure not in (None, self._warned):
            self.watcher.warn(f"MLflow takes no metrics ({self.record.failure}); they wait, training goes on")
        self._warned = self.record.failure

    def _stage(self, step: int) -> dict[str, float]:
        """Return where a step is in a run of stages, and name a stage that begins."""
        recipe = self.config.recipe
        stage = recipe.at(step)
        if not stage.name:
            return {}
        if stage.name != self._told_stage:
            self._told_stage = stage.name
            self.record.tag_later("raymuon.stage", stage.name)
        return {"stage": recipe.stages.index(stage) + 1, "global_batch": stage.global_batch}

    def report(self, report: Report) -> None:
        """Record a validation, a plan, a sample or a trace, and when a rank has its state."""
        match report:
            case Restored():
                self.start.end("engine", report.time)
            case Validated():
                self.val_loss, self.val_bits_per_byte = report.loss, report.bits_per_byte
                values = {"val_loss": report.loss}
                values |= {f"val_loss/{name}": loss for name, loss in report.by_source.items()}
                if report.bits_per_byte is not None:
                    values["val_bits_per_byte"] = report.bits_per_byte
                self._note_loss(report.step, "val_loss", report.loss)
                self._row("validation", report.step, report.time, values)
            case Planned():
                self._put("plan.json", json.dumps(report.figures, indent=1).encode(), only_first=True)
            case Sampled():
                self.sample = report.text
            case Profiled():
                self._put(f"step-{report.step}.json.gz", report.trace, "profile")
        self.watcher.report(report)

    def event(self, event: Event) -> None:
        """Journal an event, and show it in MLflow: on the loss's axis, and in the run's description."""
        self._step = max(self._step, event.step)
        self.journal.add(event)
        self.events.append(event)
        self.record.tag_later(DESCRIPTION, describe(self.config, self.record.run_id, self.links, self.events))
        self.watcher.event(event)
        match event:
            case Membership():
                self._form(event)
            case Fault():
                self._faults += 1
                self.record.note(event.step, event.time, {"faults": self._faults})
            case Recovery():
                values = {
                    "recovery_seconds": event.seconds,
                    "recovery_steps_redone": event.steps_redone,
                    "recovery_storage_bytes": event.storage_bytes,
                    "goodput": self.tally.goodput(time.monotonic()),
                }
                self.record.note(event.step, event.time, values)
                self.record.tag_later("raymuon.recoveries", str(len(self.tally.faults)))
                self.record.tag_later(
                    "raymuon.last_event", f"{event.reason} at step {event.step}, from {event.source}: {event.cause}"
                )

    def _form(self, event: Membership) -> None:
        """Show how a generation saves memory: tags tell of the newest what is given, too, as params never change."""
        train = replace(self.config.train, **event.chosen)
        self._memory = memory_saving(train, self.config.model.num_layers)
        for key in UNSAVING:
            self.record.tag_later(f"raymuon.train.{key}", str(getattr(train, key)))
        if not self._begun:
            self._begun = True
            self.start.end("record", event.time)
            steps = event.restored_step, self.last_step
            self.watcher.begin(self.record.run_id, *steps, event.world_size, self.config.recipe)

    def stack(self, name: str, text: str) -> None:
        """Keep what a worker that hung was doing beside the run."""
        self._put(f"{name}.txt", text.encode(), "stacks")

    def usage(self, usage: NodeUsage) -> None:
        """Show how busy a node is, on the loss's axis."""
        values = {f"system/{usage.node[:8]}/{name}": value for name, value in usage.values.items()}
        self.record.note(self._step, usage.time, values)

    def keep(self, files: Mapping[str, bytes]) -> None:
        """Make files artifacts of the run."""
        for name, content in files.items():
            self._put(name, content)

    def slow(self, ranks: dict[int, float]) -> None:
        """Name the ranks that are slower than the others, when they change."""
        if ranks.keys() != self._slow:
            self._slow = set(ranks)
            told = ", ".join(f"rank {rank} ({factor:.1f}x)" for rank, factor in sorted(ranks.items()))
            self.record.tag_later("raymuon.slow_ranks", told or "none")

    def committed(self, step: int) -> None:
        """Note the newest checkpoint."""
        self.checkpoint = f"{self.links.url}@{step}"
        self.record.tag_later("raymuon.checkpoint", self.checkpoint)
        self.watcher.committed(step, self.checkpoint)

    def notice(self, text: str) -> None:
        """Tell the person."""
        self.watcher.warn(text)

    def before_commit(self, step: int) -> dict[str, float]:
        """Put down what the checkpoint stands for: what MLflow does not take now is in the journal.

        Returns:
            The losses of that step.
        """
        self.record.hurry(HURRY_S)
        self._ship()
        self._losses = {at: losses for at, losses in self._losses.items() if at >= step}
        return self._losses.get(step, {})

    def close(self, now: float) -> None:
        """Put down the rest, and what it all adds up to; `now` on the monotonic clock."""
        report = recovery_report(self.events, self.tally, now)
        self.keep({"recovery.md": report.encode(), "events.json": _stored(self.events)})
        for thread in self._artifacts:
            thread.join()
        self._try(lambda: self.record.tag("raymuon.goodput", f"{self.tally.goodput(now):.4f}"))
        if (mttr := self.tally.mean_time_to_recovery()) is not None:
            self._try(lambda: self.record.tag("raymuon.mttr_seconds", f"{mttr:.2f}"))
        self._try(self._ship)

    def complete(self, result: RunResult) -> None:
        """Fill in what the record alone knows of the run: its losses are those of all attempts."""
        self.record.flush()
        result.checkpoint, result.sample = self.checkpoint, self.sample
        result.first_step, result.val_loss = self.start.seconds, self.val_loss
        result.val_bits_per_byte = self.val_bits_per_byte
        bits: dict[int, float] = {}
        try:
            result.losses = self.record.history("loss"), self.record.history("val_loss")
            bits = dict(self.record.history("val_bits_per_byte"))
        except StorageError as error:  # Closing the record will say so; the training is done.
            self.watcher.warn(str(error))
        if validations := result.losses[1]:
            (first, start), (last, result.val_loss) = validations[0], validations[-1]
            # Runs of before there were other tokenizers have no row of it: their tokens are bytes.
            result.val_bits_per_byte = bits.get(last, result.val_loss / math.log(2))
            if first == 0:
                result.val_loss_start = start
                result.val_bits_per_byte_start = bits.get(first, start / math.log(2))

    def _ship(self) -> None:
        self.journal.add(Alive(time.monotonic() - self.tally.began, time.time()))
        self.journal.ship()

    def _note_loss(self, step: int, name: str, loss: float) -> None:
        self._losses.setdefault(step, {})[name] = loss
        if len(self._losses) > LOSSES_KEPT:
            del self._losses[min(self._losses)]

    def _row(self, series: str, step: int, at: float, values: dict[str, float]) -> None:
        self.record.log(series, step, at, values)
        self.journal.add(Row(series, step, at, values))

    def _put(self, name: str, content: bytes, folder: str | None = None, only_first: bool = False) -> None:
        """Make a file an artifact of the run, with `only_first` unless it has one of that name; nobody waits."""

        def put() -> None:
            if only_first and self.record.has_artifact(name):
                return
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / name
                path.write_bytes(content)
                self.record.artifact(path, folder)

        self._artifacts.append(threading.Thread(target=self._try, args=(put,), name="artifact"))
        self._artifacts[-1].start()

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (StorageError, OSError) as error:
            self.watcher.warn(str(error))


def go_on_with(
    config: RunConfig,
    record: Any,
    journal: Journal,
    last_step: int,
    now: float,
    warn: Callable[[str], object],
) -> tuple[Tally, list[Event]]:
    """Give MLflow the rows that earlier drivers journalled and could not log, and add up what has happened so far.

    Args:
        config: with which the run goes on.
        record: the MLflow run.
        journal: of this attempt; earlier ones are read.
        last_step: rows after it are of steps that will be trained again.
        now: seconds since the epoch.
        warn: told of damage, and of a learning rate or a batch that is not what the record has.

    Returns:
        What adds up, and the events.
    """
    tally, elapsed = Tally(time.monotonic()), Elapsed()
    events: list[Event] = []
    seen: set[int] = set()
    recorded = None
    for line in read_journal(journal.store, warn):
        match line:
            case Event():
                events.append(line)
                if isinstance(line, DriverStarted):
                    elapsed.begin(line.time)
                elif isinstance(line, Recovery):
                    tally.recoveries.append(line)
            case Alive():
                elapsed.live(line.time, line.uptime)
            case Row() if line.step <= last_step:
                record.log(line.series, line.step, line.time, line.values)
                if line.series == "train" and line.step not in seen:
                    seen.add(line.step)
                    tally.step(line.values.get("step_seconds", 0.0))
                if line.series == "train" and line.step == last_step:
                    recorded = line.values.get("lr")
    if recorded is not None and (jump := rate_jump(config, last_step, recorded)):
        warn(jump)
    if told := trained_otherwise(config, record, last_step):
        warn(told)
    elapsed.begin(now)
    tally.before_s = elapsed.seconds
    return tally, events


def rate_jump(config: RunConfig, step: int, recorded: float) -> str:
    """Tell whether a run goes on with another learning rate than it had; empty where it does not.

    Args:
        config: with which it goes on: with more steps, a cosine that was at its end is in its middle again.
        step: that it goes on from.
        recorded: learning rate of that step.
    """
    rate, peak = config.recipe.learning_rate(step), config.optim.lr
    if _alike(rate, recorded):
        return ""
    return (
        f"the learning rate jumps {'up' if rate > recorded else 'down'}: step {step} was trained with {recorded:.3g} "
        f"({recorded / peak:.2f} of optim.lr), and with this config its rate is {rate:.3g} ({rate / peak:.2f}); "
        f"train.steps={config.train.steps}, its stages or the schedule of optim are not what they were"
    )


def _alike(rate: float, recorded: float) -> bool:
    return abs(rate - recorded) <= RATE_TOLERANCE * recorded


def trained_otherwise(config: RunConfig, record: Any, last_step: int) -> str:
    """Tell which steps are on record, are trained again, and have another batch or learning rate now; empty for none.

    Args:
        config: with which the run goes on.
        record: the MLflow run, which keeps each step as it came first.
        last_step: that it goes on from.
    """
    if record.marks["train"] <= last_step:
        return ""
    recipe = config.recipe
    found = [step for step, rate in record.history("lr") if not _alike(recipe.learning_rate(step), rate)]
    found += [step for step, batch in record.history("global_batch") if recipe.at(step).global_batch != batch]
    if not (others := [step for step in found if step > last_step]):
        return ""
    return (
        f"steps {min(others)} to {max(others)} were trained with another learning rate or batch before the driver was "
        "lost than they are now; MLflow keeps these rows, and the run's journal has the new ones"
    )


def _stored(events: Iterable[Event]) -> bytes:
    """Return what the artifact has of events."""
    slim = [{key: value for key, value in event.record().items() if key not in BULKY} for event in events]
    return json.dumps(slim, indent=1).encode()
