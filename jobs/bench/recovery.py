"""Recovery: seconds from a fault to the start of the next new step, raymuon against Ray Train V2, in one run.

Both sides train the demo's model, data and engine on the same kind of Ray cluster, several nodes in this machine. A
*new step* is one that was not finished before the fault, so steps that are done again count as time lost. Every fault
comes from outside: SIGKILL or SIGSTOP to a process, SIGKILL to all processes of a node, `ray drain-node`.
"""

import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jobs.bench.cluster import BenchCluster, bench_cluster
from jobs.bench.rival import CALM_STEPS, RIVAL_FAULTS, rival
from jobs.load import load
from orchestrator.config import RunConfig, absolute
from orchestrator.driver import run
from orchestrator.record.events import Event, Membership, Recovery
from orchestrator.record.result import RunResult
from orchestrator.record.watcher import Watcher
from orchestrator.stop import StopSignal
from workers.common.errors import TrainingError
from workers.reports import Report, StepDone

STANDBY_STEPS = 40
"""The same where a new standby has to be ready by then."""
WORKERS = 3


@dataclass
class Measured:
    """One fault and what came of it."""

    seconds: float
    steps_redone: int
    storage_bytes: int


@dataclass
class Script(Watcher):
    """Watches our run from inside the driver, breaks things one after the other, and measures.

    Args:
        cluster: on which the run is.
        plan: names of faults, in order.
        world_size: at which each is tried.
        say: takes a line about each.
    """

    cluster: BenchCluster
    plan: list[str]
    world_size: int
    say: Callable[[str], None]
    calm_steps: int = CALM_STEPS
    stop: StopSignal = field(default_factory=StopSignal)
    results: dict[str, list[Measured]] = field(default_factory=dict)
    group: Membership | None = None
    broken: tuple[str, float, int] | None = None
    """What was broken, when, and in which generation."""
    victim: str = ""
    calm: int = 0
    acting: bool = False

    def event(self, event: Event) -> None:
        """Learn who is in the group, and what a recovery came to."""
        match event:
            case Membership():
                self.group = event
                self.calm = 0
            case Recovery() if self.broken is not None and event.generation > self.broken[2]:
                self._note(event)

    def report(self, report: Report) -> None:
        """Count calm steps, and break the next thing when there are enough."""
        if not isinstance(report, StepDone) or self.group is None:
            return
        self.calm += 1
        whole = self.group.world_size == self.world_size and report.generation == self.group.generation
        if whole and self.calm > self.calm_steps and self.broken is None and not self.acting:
            if not self.plan:
                if not self.stop.requests:  # A second request would be an abort.
                    self.stop.request()
                return
            self.acting = True
            threading.Timer(random.random() * report.seconds, self._act, (self.plan.pop(0),)).start()

    def _act(self, name: str) -> None:
        group = self.group
        assert group is not None
        node, pid = group.nodes[-1], group.pids[-1]
        match name:
            case "worker_kill" | "worker_kill_fixed":
                at = _signal(pid, signal.SIGKILL)
            case "rank0_kill":
                at = _signal(group.pids[0], signal.SIGKILL)
            case "hang":
                at = _signal(pid, signal.SIGSTOP)
            case "double_fault":
                at = _signal(pid, signal.SIGKILL)
                self.broken = name, at, group.generation
                time.sleep(0.15)
                _signal(group.pids[0], signal.SIGKILL)
            case "node_kill":
                at = self.cluster.kill_node(node)
            case "drain":
                at = self.cluster.drain_node(node)
            case _:
                raise ValueError(name)
        self.broken, self.victim, self.acting = (name, at, group.generation), node, False

    def _note(self, event: Recovery) -> None:
        assert self.broken is not None
        name, at, _ = self.broken
        if event.reason == "grow":
            name = "node_add"
        # An announced change stops nobody until its boundary: what it costs is the pause.
        seconds = event.seconds if event.reason in ("grow", "preemption") else event.resumed - at
        self.results.setdefault(name, []).append(Measured(seconds, event.steps_redone, event.storage_bytes))
        self.say(f"raymuon, {name}: {seconds:.2f} s, {event.steps_redone} step(s) redone")
        if name not in ("node_kill", "drain"):
            self.broken = None  # The group is whole, or grows back by itself.
        else:
            if name == "drain":
                self.cluster.kill_node(self.victim)
            # Ray starts nodes in the main thread alone, which is the driver's: training goes on meanwhile.
            self.cluster.add_node()


def _signal(pid: int, number: int) -> float:
    at = time.time()
    os.kill(pid, number)
    return at


def recovery(overrides: list[str], repeats: int, rival_repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every kind of fault and return medians, and Ray Train's for the same.

    Args:
        overrides: of the demo's config.
        repeats: of each fault on our side.
        rival_repeats: of each fault with Ray Train and tuned time-outs; with its defaults each is tried once. 0 leaves
            Ray Train out.
        say: takes a line about each measurement.
    """
    names = ["worker_kill", "rank0_kill", "hang", "double_fault", "node_kill", "drain"]
    with tempfile.TemporaryDirectory(prefix="raymuon-recovery-") as folder:
        config = _config(folder, overrides, WORKERS, WORKERS - 2)
        with bench_cluster(WORKERS) as cluster:
            script = Script(cluster, [name for _ in range(repeats) for name in names], WORKERS, say)
            _lead(config, script)
        results = script.results
        fixed = _config(folder, [*overrides, "scaling.standby=1"], WORKERS, WORKERS)
        with bench_cluster(WORKERS + 1) as cluster:
            script = Script(cluster, ["worker_kill_fixed"] * repeats, WORKERS, say, STANDBY_STEPS)
            _lead(fixed, script)
        results |= script.results
        report: dict[str, Any] = {name: _medians(measured) for name, measured in results.items()}
        report |= _snapshot_cost(folder, overrides, say)
        for tuned, times in (("ray_train_tuned", rival_repeats), ("ray_train_default", min(1, rival_repeats))):
            found = {
                name: rival(config, name, tuned == "ray_train_tuned", times, say) for name in RIVAL_FAULTS if times
            }
            report[tuned] = {name: _medians([Measured(*one) for one in measured]) for name, measured in found.items()}
    report["speedup_over_tuned"] = {
        name: report["ray_train_tuned"][name]["seconds"] / report[name]["seconds"] for name in report["ray_train_tuned"]
    }
    return report


def _config(folder: str, overrides: list[str], most: int, least: int) -> RunConfig:
    fixed = [
        "train.steps=1000000",
        "train.validate_every=0",
        "train.sample_prompt=''",
        "checkpoint.every=50",
        "checkpoint.snapshot_every=1",
        f"checkpoint.url={folder}/checkpoints",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"scaling.max_workers={most}",
        f"scaling.min_workers={least}",
        "recovery.max_failures=-1",
        "recovery.free_retries=100",
    ]
    return absolute(load("demo", [*fixed, *overrides]))


def _lead(config: RunConfig, script: Script) -> RunResult:
    """Run until the script has asked for a stop."""
    result = run(config, "never", script.cluster.address, script, script.stop)
    if script.plan:
        raise TrainingError(f"the run ended before {', '.join(script.plan)} had been tried")
    return result


def _medians(measured: list[Measured]) -> dict[str, Any]:
    return {
        "seconds": statistics.median(one.seconds for one in measured),
        "steps_redone": statistics.median(one.steps_redone for one in measured),
        "storage_bytes": statistics.median(one.storage_bytes for one in measured),
        "all_seconds": [round(one.seconds, 3) for one in measured],
        "all_steps_redone": [one.steps_redone for one in measured],
    }


class _Pace(Watcher):
    """Keeps the steps' seconds and stops the run after enough of them."""

    def __init__(self, steps: int) -> None:
        self.stop, self.steps = StopSignal(), steps
        self.seconds: list[float] = []
        self.snapshot_seconds: list[float] = []
        self.every = 0

    def report(self, report: Report) -> None:
        if isinstance(report, StepDone) and report.step > CALM_STEPS:
            self.seconds.append(report.seconds)
            self.snapshot_seconds.append(report.snapshot_seconds)
            self.every = report.snapshot_every
            if len(self.seconds) == self.steps:
                self.stop.request()


def _snapshot_cost(folder: str, overrides: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what snapshots cost on two nodes (so with copies at the buddy): never, every step, as often as it likes.

    `snapshot_cost_*` is the time that they hold training up over the time of the steps. `snapshot_step_ratio_*`
    compares whole step times with those of runs without snapshots, in turns; its noise is larger than what it measures.
    """
    arms = {"never": 10**6, "k1": 1, "auto": 0}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    held: dict[str, list[float]] = {arm: [] for arm in arms}
    every = 0
    with bench_cluster(2) as cluster:
        for _ in range(3):
            for arm, k in arms.items():
                pace = _Pace(40)
                config = _config(folder, [*overrides, f"checkpoint.snapshot_every={k}", "checkpoint.every=0"], 2, 2)
                run(config, "never", cluster.address, pace, pace.stop)
                seconds[arm].append(statistics.median(pace.seconds))
                held[arm].append(sum(pace.snapshot_seconds) / sum(pace.seconds))
                every = pace.every if arm == "auto" else every
                say(f"snapshots {arm}: median step {seconds[arm][-1]:.3f} s, held up {held[arm][-1]:.2%}")
    ratio = {arm: [a / b for a, b in zip(seconds[arm], seconds["never"], strict=True)] for arm in ("k1", "auto")}
    return {
        "snapshot_cost_k1": statistics.median(held["k1"]),
        "snapshot_cost_auto": statistics.median(held["auto"]),
        "snapshot_every_auto": every,
        "snapshot_step_ratio_k1": statistics.median(ratio["k1"]),
        "snapshot_step_ratio_auto": statistics.median(ratio["auto"]),
    }
