"""A run on the terminal: a progress bar where there is one, plain lines in a log file."""

import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jobs.screen import Screen, mlflow_page
from orchestrator.record.events import Event, Fault, Membership, Recovery
from workers.recipe import Recipe
from workers.reports import Report, StepDone, Validated

LOG_S = 10.0
"""Seconds between lines where the output is not a terminal."""


class TerminalWatcher:
    """Shows step, loss, tokens per second and the time that is left, on stderr.

    Progress is counted in sequences: later steps may have more of them.
    """

    def __init__(self) -> None:
        self.console = Screen(stderr=True)
        self.last_step = 0
        self.warned = ""
        self.next_line = 0.0
        self.rate = 0.0
        self._chosen: dict[str, Any] = {}
        self.bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=2,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> "TerminalWatcher":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def phase(self, text: str) -> None:
        """Say what the start is doing."""
        self.console.print(f"{text} ...", style="dim")

    def warn(self, text: str) -> None:
        """Say what is wrong; once, where several stumble over the same one after the other."""
        if text == self.warned:
            return
        self.warned = text
        self.console.print(text, style="yellow", soft_wrap=True)  # It may have a command that can be pasted.

    def page(self, tracking_uri: str, path: str) -> None:
        """Say where the run can be watched."""
        self.console.print(f"MLflow:     {mlflow_page(tracking_uri, path)}", style="dim")

    def begin(self, run_id: str, first_step: int, last_step: int, world_size: int, recipe: Recipe) -> None:
        """Show the bar."""
        where = f" from step {first_step}" if first_step else ""
        self.console.print(f"run {run_id}: {world_size} worker(s), training{where} to step {last_step}")
        self.last_step, self.recipe = last_step, recipe
        done, all_ = (recipe.samples_before(step + 1) for step in (first_step, last_step))
        self.task = self.bar.add_task("train", total=all_, completed=done, step=f"{first_step}/{last_step}", numbers="")

    def report(self, report: Report) -> None:
        """Move the bar, or write a line now and then."""
        match report:
            case StepDone():
                speed = report.step_tokens / report.seconds
                self.rate = 0.9 * self.rate + 0.1 * speed if self.rate else speed
                begun, done, all_ = map(self.recipe.samples_before, (report.step, report.step + 1, self.last_step + 1))
                left = (all_ - done) / (done - begun) * report.step_tokens / self.rate
                step, numbers = f"{report.step}/{self.last_step}", f"loss {report.loss:.4f}  {self.rate:,.0f} tokens/s"
                assert self.task is not None
                self.bar.update(self.task, completed=done, step=step, numbers=numbers)
                if not self.console.is_terminal and time.monotonic() >= self.next_line:
                    self.next_line = time.monotonic() + LOG_S
                    self.console.print(f"step {step}  {numbers}  {left:.0f} s left")
            case Validated():
                bits = "" if report.bits_per_byte is None else f", {report.bits_per_byte:.4f} bits per byte"
                parts = ", ".join(f"{name} {loss:.4f}" for name, loss in report.by_source.items())
                of = f" ({parts})" if len(report.by_source) > 1 else ""
                self.console.print(f"step {report.step}: validation loss {report.loss:.4f} nats per token{of}{bits}")

    def event(self, event: Event) -> None:
        """Say what happened to the group, and that it goes on."""
        match event:
            case Fault():
                self.console.print(f"step {event.step}: {event.cause}", style="yellow")
            case Membership():
                if event.reason != "start":
                    source = event.source.replace("keepers", "the keepers' memory").replace("start", "the start")
                    self.console.print(
                        f"step {event.restored_step}: {event.previous_world_size} -> {event.world_size} worker(s), "
                        f"going on from {source}"
                    )
                if event.chosen != self._chosen:
                    self._chosen = event.chosen
                    keys = " ".join(f"train.{key}={value}" for key, value in event.chosen.items())
                    self.console.print(f"as fast as fits {event.world_size} worker(s): {keys}", style="dim")
            case Recovery() if event.reason != "start":
                redone = f"{event.steps_redone} step(s) redone" if event.steps_redone else "no step redone"
                self.console.print(
                    f"step {event.step}: training again after {event.seconds:.2f} s, {redone}", style="green"
                )

    def committed(self, step: int, url: str) -> None:
        """Say that a checkpoint counts."""
        self.console.print(f"step {step}: checkpoint", style="dim")
