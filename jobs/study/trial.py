"""A trial while it is trained: an ordinary run in a thread of its own, watched for the study, and ended if hopeless."""

import importlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.study.question import Series
from orchestrator.config import RunConfig, RunInfo, TrackingConfig
from orchestrator.generation import Decide
from orchestrator.record.events import Event, Fault, Recovery
from orchestrator.record.watcher import Watcher
from orchestrator.stop import StopSignal
from workers.recipe import TrainConfig
from workers.reports import Report, StepDone

HOPELESS_AFTER = 0.25
"""Share of a trial's steps after which its loss is looked at."""
SMOOTHED = 0.05
"""Share of them over which it is averaged."""
WORSE = 1.1
"""Times the loss at the start: what learns slowly, in a long warm-up for instance, stays below."""


def diverged(losses: Series, start: float, steps: int) -> str:
    """Tell why a trial is hopeless; empty where it is not.

    It is where a loss is not finite, and where, a quarter of the steps having gone, their last twentieth has a mean
    that is a tenth above the loss with which it all began. Such a trial is never the best of several.

    Args:
        losses: of the training, so far.
        start: the first loss, of the trial that it branched from where there is one.
        steps: after which it ends.
    """
    if not losses:
        return ""
    step, loss = losses[-1]
    if not math.isfinite(loss):
        return f"diverged: the loss of step {step} is {loss}"
    window = max(1, math.ceil(SMOOTHED * steps))
    if step < max(HOPELESS_AFTER * steps, window) or len(losses) < window:
        return ""
    mean = sum(value for _, value in losses[-window:]) / window
    if mean <= WORSE * start:
        return ""
    return f"diverged: after step {step} of {steps} the loss is {mean:.4g}, and it began at {start:.4g}"


@dataclass
class TrialWatcher(Watcher):
    """Takes note of what a trial does, from its driver's thread."""

    name: str
    say: Callable[[str], object]
    """Takes a line that a person should see."""
    last_step: int
    early_stop: bool
    stop: StopSignal = field(default_factory=StopSignal)
    start: float | None = None
    """The loss with which it all began."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    step: int = 0
    loss: float | None = None
    seconds: float = 0.0
    """Spent in the steps of this attempt."""
    steps: int = 0
    """Of this attempt."""
    committed_steps: set[int] = field(default_factory=set)
    hopeless: str = ""
    """Why it was ended early."""

    def warn(self, text: str) -> None:
        """Hand on what does not end the trial."""
        self.say(f"{self.name}: {text}")

    def report(self, report: Report) -> None:
        """Take note of a step."""
        if not isinstance(report, StepDone):
            return
        self.step, self.loss, self.seconds, self.steps = (
            report.step,
            report.loss,
            self.seconds + report.seconds,
            self.steps + 1,
        )
        self.start = report.loss if self.start is None else self.start
        if not self.losses or report.step > self.losses[-1][0]:
            self.losses.append((report.step, report.loss))
        if self.early_stop and not self.hopeless and report.step < self.last_step:
            self.hopeless = diverged(self.losses, self.start, self.last_step)
            if self.hopeless:
                self.stop.request()

    def event(self, event: Event) -> None:
        """Hand on what has happened to the trial's workers."""
        match event:
            case Fault():
                self.say(f"{self.name}: step {event.step}: {event.cause}")
            case Recovery() if event.reason != "start":
                self.say(f"{self.name}: step {event.step}: training again after {event.seconds:.2f} s")

    def committed(self, step: int, url: str) -> None:
        """Take note of a checkpoint, from which another trial may branch."""
        self.committed_steps.add(step)


_deciding = threading.Lock()


def decider() -> Decide:
    """Return what decides by the plan for one trial; trials that are of one shape are decided once."""
    deciders: list[Any] = []

    def decide(config: RunConfig, nodes: Sequence[str], devices: Sequence[str]) -> TrainConfig:
        if not config.train.open:
            return config.train
        with _deciding:  # The plan imports torch, and finds what one trial has found for the next.
            deciders[:] = deciders or [importlib.import_module("jobs.planning.choice").Decider()]
            return deciders[0](_shape(config), nodes, devices)

    return decide


def _shape(config: RunConfig) -> RunConfig:
    """Return a config without what no plan depends on."""
    fresh = RunConfig()
    optim = replace(config.optim, lr=fresh.optim.lr, weight_decay=0.0)
    return replace(config, run=RunInfo(), tracking=TrackingConfig(), seed=0, optim=optim)
