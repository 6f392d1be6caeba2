"""What workers and keepers tell, taken in: it moves the run on, goes on record, and makes checkpoints count."""

import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from typing import Any

from orchestrator.config import RunConfig
from orchestrator.generation import Change, Generation
from orchestrator.group.handles import Gone
from orchestrator.group.pool import Pool
from orchestrator.log.commits import Commits
from orchestrator.log.saves import Saves
from orchestrator.policy import FailurePolicy, newest_snapshot
from orchestrator.record.events import Recovery
from orchestrator.record.progress import Progress, Recorder
from workers.reports import (
    CheckpointDamaged,
    KeeperLost,
    Planned,
    Profiled,
    Report,
    Restored,
    Sampled,
    SaveFailed,
    SaveRetried,
    SaveSkipped,
    ShardWritten,
    StepDone,
    Terminating,
    Validated,
)
from workers.snapshots.kept import KeptShard, Snapshot
from workers.task import Task

INVENTORY_S = 1.0
"""How long a keeper may take to tell what it has; a dead node's never does."""


class Intake:
    """Takes in what is told during an attempt, and knows where the run is.

    Args:
        config: of the run.
        pool: the processes.
        commits: turns shards into checkpoints.
        task: what to train; its manifest is where to go on from.
        progress: what the record has already.
        recorder: is told everything.
    """

    def __init__(
        self, config: RunConfig, pool: Pool, commits: Commits, task: Task, progress: Progress, recorder: Recorder
    ) -> None:
        self.pool, self.progress, self.recorder = pool, progress, recorder
        self.policy = FailurePolicy(config.recovery)
        self.saves = Saves(config, commits, task, progress, self.policy, recorder)
        self.generation = Generation()
        self.change: Change | None = Change("start")
        """Why the generation was formed, or the next one is; None once it has made a new step."""
        self.planned = False
        """Whether a generation has told how the matrices are shared out."""
        self.heard_of_save = 0.0
        """When a part of a checkpoint was written last, or tried again."""

    def look_after_pool(self) -> None:
        """Take in what the keepers have told, and what the pool has found."""
        told = self.pool.take()
        self.take(told.reports)
        self.saves.try_again()
        for _ in range(told.lost_keepers):
            self.saves.keeper_lost()
        for usage in told.usage:
            self.recorder.usage(usage)

    def newest_snapshot(self) -> Snapshot | None:
        """Ask all keepers what they have; take in the rows and the validation that come with it.

        They listen no more to generations before the present one.
        """
        asked: list[Future[list[KeptShard]]] = [
            keeper.handle.call("inventory", self.generation.number)
            for keeper in self.pool.keepers.values()
            if keeper.address
        ]
        done, _ = wait(asked, INVENTORY_S)
        kept: list[KeptShard] = []
        for answer in done:
            with suppress(Gone):  # The pool finds out by itself.
                kept += answer.result()
        snapshot = newest_snapshot(kept, self.saves.newest)
        if snapshot is None:
            return None
        notes = next(shard for shard in snapshot.shards if shard.agreed).notes
        told: list[Report] = [StepDone(generation=snapshot.generation, rank=0, **row) for row in notes["rows"]]
        if notes["validation"] is not None:
            told.append(Validated(generation=snapshot.generation, rank=0, **notes["validation"]))
        self.take(told)
        # The notes have served; the workers need the counters alone.
        return replace(snapshot, shards=tuple(replace(shard, notes={}) for shard in snapshot.shards))

    def take(self, reports: Iterable[Report]) -> None:
        """Take reports in, each once, in the order in which they came."""
        for report in reports:
            self._take(report)

    def _take(self, report: Report) -> None:
        match report:
            case StepDone():
                if report.generation == self.generation.number:
                    self.generation.reached = report.step
                if report.step > self.progress.step:
                    self._step(report)
            case Validated() if report.step > self.progress.validated:
                self.progress.validated = report.step
                self.recorder.report(report)
                self.saves.take_held()
            case ShardWritten():
                self.heard_of_save = time.monotonic()
                self.saves.take(report)
            case SaveFailed():
                self.saves.failed(report.generation, report.step, report.error)
            case SaveRetried():
                self.heard_of_save = time.monotonic()
                self.recorder.notice(f"step {report.step}: rank {report.rank} writes its shard again: {report.error}")
            case SaveSkipped():
                self.saves.skipped(report.step)
                self.recorder.notice(f"step {report.step}: no checkpoint; earlier ones are still being written")
            case CheckpointDamaged():
                self.saves.fall_back(report)
            case Restored():
                self.generation.ready.add(report.rank)
                self.generation.storage_bytes += report.storage_bytes
                if self.generation.in_step:  # The last one's: the others wait for it.
                    self.recorder.report(report)
            case Terminating():
                if (worker := self.pool.workers.get(self.generation.members[report.rank])) is not None:
                    worker.leaving = True
            case KeeperLost():
                self.recorder.notice(f"rank {report.rank} has lost its keeper ({report.error}); training goes on")
            case Planned() | Sampled() | Profiled():
                self.planned = self.planned or isinstance(report, Planned)
                self.recorder.report(report)

    def _step(self, report: StepDone) -> None:
        """A step that was never finished before."""
        self.policy.progressed()
        self.recorder.tally.step(report.seconds)
        self.progress.step, self.progress.tokens = report.step, report.tokens
        if self.change is not None and report.generation == self.generation.number:
            change, self.change = self.change, None
            if change.reason != "start" or self.generation.restored:
                recovery = Recovery(
                    **self.now(),
                    reason=change.reason,
                    cause=change.cause,
                    generation=self.generation.number,
                    world_size=self.progress.world_size,
                    source=self.generation.source,
                    steps_redone=self.generation.redone,
                    storage_bytes=self.generation.storage_bytes,
                    resumed=report.time - report.seconds,
                    seconds=change.seconds(report.time - report.seconds, report.seconds),
                )
                self.recorder.tally.recoveries.append(recovery)
                self.recorder.event(recovery)
        self.recorder.step(report, self.progress.world_size)
        self.saves.begun(report.step)
        self.saves.take_held()

    def now(self) -> dict[str, Any]:
        """Return what every event has."""
        return {"time": time.time(), "step": self.progress.step}
