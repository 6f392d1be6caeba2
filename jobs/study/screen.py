"""A study on the terminal: a bar of the whole, and a line for each trial that runs; plain lines in a log file."""

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from jobs.screen import Screen
from jobs.study.progress import Account, told
from jobs.study.trial import TrialWatcher

LOG_S = 10.0
"""Seconds between lines where the output is not a terminal."""


class StudyScreen:
    """Shows a study on stderr."""

    def __init__(self) -> None:
        self.console = Screen(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[told]}"),
            console=self.console,
            refresh_per_second=2,
            disable=not self.console.is_terminal,
        )
        self._whole: TaskID | None = None
        self._trials: dict[str, TaskID] = {}
        self._next_line = 0.0
        self._said = ""

    def __enter__(self) -> "StudyScreen":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Write a line; from any thread."""
        self.console.print(text, soft_wrap=True)

    def show(self, now: Account, running: list[TrialWatcher]) -> None:
        """Move the bars, or write a line now and then."""
        if not self.console.is_terminal:
            self._line(told(now))
            return
        if self._whole is None:
            self._whole = self.bar.add_task("study", told="")
        self.bar.update(self._whole, total=now.expected_flops, completed=now.flops, told=told(now))
        for name in self._trials.keys() - {one.name for one in running}:
            self.bar.remove_task(self._trials.pop(name))
        for one in running:
            if one.name not in self._trials:
                self._trials[one.name] = self.bar.add_task(one.name, told="")
            loss = "" if one.loss is None else f"  loss {one.loss:.4f}"
            text = f"step {one.step}/{one.last_step}{loss}"
            self.bar.update(self._trials[one.name], total=one.last_step, completed=one.step, told=text)

    def _line(self, text: str) -> None:
        if text != self._said and time.monotonic() >= self._next_line:
            self._next_line, self._said = time.monotonic() + LOG_S, text
            self.console.print(text)
