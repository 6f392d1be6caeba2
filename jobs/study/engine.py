"""Trains the trials of a study, several at a time on one joined cluster, until its question asks for no more.

A trial that would fail again is one more answer; what the cluster or storage does to one leaves it open, and the others
go on. Everything that decides what begins is in MLflow: a study that was killed goes on where it was.
"""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jobs.load import plain_yaml
from jobs.origin import with_checkpoint
from jobs.prepare import prepared
from jobs.screen import Screen
from jobs.study.file import last_step
from jobs.study.progress import Account
from jobs.study.question import Trial
from jobs.study.schedule import branch_steps, next_trial, orphan
from jobs.study.state import StudyState
from jobs.study.trial import TrialWatcher, decider
from orchestrator.config import RunConfig, absolute
from orchestrator.driver import Options, run_on
from orchestrator.group.handles import Joined
from orchestrator.living import BranchPoint, Living
from orchestrator.preflight import run_store
from orchestrator.record.result import RunResult
from orchestrator.stop import StopSignal
from workers.common.errors import ClusterError, ConfigError, Interrupted, RaymuonError, TrainingError
from workers.data.corpus import Corpus

LOOK_S = 0.2
"""Between two looks at the trials that run."""
WOULD_FAIL_AGAIN = (ConfigError, TrainingError)


class Display(Protocol):
    """Whoever shows a study to a person."""

    def show(self, now: Account, running: list[TrialWatcher]) -> None:
        """Show how far it is; called a few times a second."""

    def say(self, text: str) -> None:
        """Tell what has happened; from any thread."""


class Data:
    """The prepared sources of all trials: those of one config are prepared once."""

    def __init__(self, address: str | None, console: Screen) -> None:
        self.address, self.console = address, console
        self._known: dict[Any, tuple[Corpus, ...]] = {}
        self._lock = threading.Lock()

    def of(self, config: RunConfig, stop: StopSignal) -> tuple[Corpus, ...]:
        """Return the prepared sources of a trial."""
        key = (repr(config.data), config.storage, config.tracking.uri, config.model.vocab_size, config.train.seq_len)
        with self._lock:
            if key not in self._known:
                self._known[key] = prepared(config, self.address, stop, self.console)
            return self._known[key]


@dataclass
class Running:
    """A trial that is trained now."""

    run_id: str
    watcher: TrialWatcher
    living: Living
    """Where others branch off while it trains."""
    future: "Future[RunResult]"


@dataclass
class Engine:
    """A study while it is run.

    Args:
        state: where it is.
        data: of its trials.
        joined: the cluster.
        at_once: trials at a time.
        stop: tells when a person wants it to end.
        display: shows it.
        check: raises where another process has taken the study over.
    """

    state: StudyState
    data: Data
    joined: Joined
    at_once: int
    stop: StopSignal
    display: Display
    check: Callable[[], object]
    running: dict[str, Running] = field(default_factory=dict, init=False)
    open: dict[str, RaymuonError] = field(default_factory=dict, init=False)
    """What the cluster or storage has done to trials, by name."""

    def run(self) -> None:
        """Train until nothing is left that can be trained now, or until a person wants an end and all have saved.

        Raises:
            Interrupted: a person wants the end at once.
            FencedError: another process has taken the study over; the trials have saved.
        """
        with ThreadPoolExecutor(self.at_once, thread_name_prefix="trial") as threads, self.stop.during_training():
            try:
                while self._begin(threads):
                    self._show()
                    self._wait()
            except BaseException as error:
                self._stop(2 if isinstance(error, Interrupted) else 1)
                raise
        self._show()

    def _begin(self, threads: ThreadPoolExecutor) -> bool:
        """Begin what can be begun; tell whether anything runs."""
        while found := orphan(self.state.trials, self.state.done):
            self._say_failed(found[0].name, found[1])
            self.state.cannot_begin(*found)
        while len(self.running) < self.at_once and not self.stop.requests and (trial := self._next()):
            self._start(trial, threads)
        return bool(self.running)

    def _next(self) -> Trial | None:
        return next_trial(self.state.trials, self.state.done, {*self.running, *self.open}, self._has_step)

    def _has_step(self, name: str, step: int) -> bool:
        outcome, running = self.state.done.get(name), self.running.get(name)
        if outcome is not None:
            return outcome.status == "finished"
        return running is not None and step in running.watcher.committed_steps

    def _start(self, trial: Trial, threads: ThreadPoolExecutor) -> None:
        begun, branches = self.state.begun.get(trial.name), branch_steps(self.state.trials, trial.name)
        config = self._placed(trial, [*branches])
        early = self.state.found.study.early_stop == "diverged"
        watcher = TrialWatcher(trial.name, self.display.say, last_step(trial, config), early)
        if begun:
            watcher.step, watcher.losses = begun.step, self.state.record.losses(begun.run_id)
            watcher.committed_steps = {step for step in branches if step <= begun.saved}
        watcher.start = self._first_loss(trial, watcher)
        run_id = self.state.record.begin(trial, config, begun)
        how = f", goes on behind step {begun.step}" if begun and begun.step else ""
        self.display.say(f"{trial.name}: begins{how}")
        living = Living({step: len(names) for step, names in branches.items() if step not in watcher.committed_steps})
        work = threads.submit(self._train, trial, config, run_id, watcher, living if living.steps else None)
        self.running[trial.name] = Running(run_id, watcher, living, work)

    def _placed(self, trial: Trial, branch_at: list[int]) -> RunConfig:
        """Return the config of a trial with where it begins, and checkpoints at the steps where others branch off."""
        config = self.state.configs[trial.name]
        if branch_at:
            at = tuple(sorted({*config.checkpoint.at, *branch_at}))
            config = replace(config, checkpoint=replace(config.checkpoint, at=at))
        if trial.branch is None:
            return config
        url = run_store(self.state.configs[trial.branch.trial], self._run_id(trial.branch.trial)).url
        return replace(config, train=replace(config.train, init=f"{url}@{trial.branch.step}", init_state="run"))

    def _run_id(self, name: str) -> str:
        if name in self.running:
            return self.running[name].run_id
        return self.state.done[name].run_id

    def _first_loss(self, trial: Trial, watcher: TrialWatcher) -> float | None:
        """Return the loss with which a trial, or what it branches from, has begun; None before its first step."""
        root = trial
        by_name = {one.name: one for one in self.state.trials}
        while root.branch is not None:
            root = by_name[root.branch.trial]
        if root is trial:
            return watcher.losses[0][1] if watcher.losses else None
        if root.name in self.state.done:
            losses = self.state.done[root.name].losses
            return losses[0][1] if losses else None
        return self.running[root.name].watcher.start if root.name in self.running else None

    def _train(
        self, trial: Trial, config: RunConfig, run_id: str, watcher: TrialWatcher, living: Living | None
    ) -> RunResult:
        """Train a trial, in its thread."""
        stop, point = watcher.stop, self._branch_point(trial, watcher.stop)
        try:
            config = absolute(with_checkpoint(config, watcher.warn))
            options = Options(
                files={"config.yaml": plain_yaml(config).encode()},
                corpora=self.data.of(config, stop),
                decide=decider(),
                take_over=True,  # Whoever led it was a thread of the study's last process, whose lease is ours now.
                until=trial.stop_at,
                living=living,
                branch=point,
            )
            return run_on(self.joined, config, run_id, watcher, stop, options)
        finally:
            if point is not None:
                point.done()

    def _branch_point(self, trial: Trial, stop: StopSignal) -> BranchPoint | None:
        """Return where a trial begins in the memory of a living one; None where it begins elsewhere."""
        parent = self.running.get(trial.branch.trial) if trial.branch else None
        if trial.branch is None or parent is None or trial.branch.step not in parent.living.steps:
            return None
        return parent.living.wait(trial.branch.step, stop.check)

    def _wait(self) -> None:
        """Wait for the next that ends, or a little while; hand on what a person wants."""
        wait([one.future for one in self.running.values()], timeout=LOOK_S, return_when=FIRST_COMPLETED)
        self.check()
        if self.stop.requests:
            self._stop(1)
        self.stop.check()
        for name, one in [*self.running.items()]:
            if one.future.done():
                del self.running[name]
                self._ended(name, one)

    def _stop(self, requests: int) -> None:
        for one in self.running.values():
            one.watcher.stop.requests = max(requests, one.watcher.stop.requests)

    def _ended(self, name: str, one: Running) -> None:
        """Put down what a trial has come to."""
        try:
            result = one.future.result()
        except WOULD_FAIL_AGAIN as error:
            self._fail(name, one, str(error))
        except Interrupted:
            pass  # A person wants it; it goes on from its checkpoint.
        except RaymuonError as error:
            self.open[name] = error
            self.display.say(f"{name}: not done, and can go on: {error}")
        else:
            if one.watcher.hopeless:  # The rule decides, not who was faster: it or the request to stop.
                self._fail(name, one, one.watcher.hopeless)
            elif result.status == "finished":
                self.state.ended(one.run_id)
                self._say_done(name)
            elif not self.stop.requests:
                self.open[name] = ClusterError(f"ended at step {result.steps}, and nobody has asked for it")

    def _fail(self, name: str, one: Running, why: str) -> None:
        self._say_failed(name, why)
        self.state.record.fail(one.run_id, why)
        self.state.ended(one.run_id)

    def _say_failed(self, name: str, why: str) -> None:
        self.display.say(f"{name}: failed, and would again: {why}")

    def _say_done(self, name: str) -> None:
        outcome = self.state.done[name]
        loss = "no validation" if outcome.val_loss is None else f"validation loss {outcome.val_loss:.4f} nats per token"
        self.display.say(f"{name}: {loss}, {outcome.steps:,} steps in {outcome.seconds:.0f} s")

    def _show(self) -> None:
        watchers = {name: one.watcher for name, one in self.running.items()}
        self.display.show(self.state.account(watchers, self.at_once), [*watchers.values()])
