"""The checkpoints of an attempt as they come: which count, which are given up, and which is gone on from."""

import time
from dataclasses import dataclass, replace

from orchestrator.config import RunConfig
from orchestrator.log.commits import Commits
from orchestrator.log.run_log import FencedError
from orchestrator.policy import FailurePolicy
from orchestrator.record.events import Fallback, SaveFailure
from orchestrator.record.progress import Progress, Recorder
from workers.common.errors import DamagedError, StorageError
from workers.reports import CheckpointDamaged, ShardWritten
from workers.task import Task

COMMIT_TRIES = 4
COMMIT_BACKOFF_S = 1.0
"""Before the second try; it doubles."""
WITH_KEEPER = "a part of it went with its keeper"


@dataclass(frozen=True, slots=True)
class _Refused:
    """A checkpoint whose commit storage has refused."""

    report: ShardWritten
    """Its last shard."""
    tries: int
    again_at: float
    """On the monotonic clock."""
    error: str


class Saves:
    """Takes shards in, and keeps the task's manifest at the newest checkpoint.

    Args:
        config: of the run.
        commits: turns shards into checkpoints.
        task: what to train; its manifest is where to go on from.
        progress: what is on record.
        policy: counts what storage refuses.
        recorder: is told everything.
    """

    def __init__(
        self,
        config: RunConfig,
        commits: Commits,
        task: Task,
        progress: Progress,
        policy: FailurePolicy,
        recorder: Recorder,
    ) -> None:
        self.config, self.commits, self.task = config, commits, task
        self.progress, self.policy, self.recorder = progress, policy, recorder
        self.given_up: dict[tuple[int, int], str] = {}
        """Generations and their steps of which a shard could not be written, and why."""
        self._held: list[ShardWritten] = []
        """Shards of steps whose rows have not come yet."""
        self._refused: dict[tuple[int, int], _Refused] = {}
        """Generations and steps of which storage has every shard, and has refused the commit."""
        self._due: set[int] = set()
        """Steps whose checkpoints are on their way."""
        self._as_it_is = -1
        """Step whose checkpoint needs no validation before it counts."""
        self._doubtful: set[int] = set()
        """Those of them that were on their way when a keeper was lost, perhaps with a part that nobody else had."""

    @property
    def newest(self) -> tuple[int, int]:
        """Generation and step of the newest checkpoint."""
        return self.commits.newest

    def begun(self, step: int) -> None:
        """Note that a step is finished, with which a checkpoint may begin."""
        if self.task.saves(step):
            self._due.add(step)

    def expect(self, generation: int, step: int) -> None:
        """Have a checkpoint that ends the run early count without its validation: who goes on from it makes that."""
        self._as_it_is = step
        self.given_up.pop((generation, step), None)
        self.take_held()

    def skipped(self, step: int) -> None:
        """Note that a checkpoint was left out."""
        self._due.discard(step)

    def keeper_lost(self) -> None:
        """Note that a keeper is gone; what was in doubt before, and does not count by now, has gone with the last one.

        Raises:
            StorageError: that has happened too often.
        """
        in_doubt = self._due - {step for _, step in self._refused}
        lost, self._doubtful = self._doubtful & in_doubt, in_doubt
        for step in sorted(lost):
            self._give_up(step, WITH_KEEPER)

    def take(self, report: ShardWritten) -> None:
        """Take a shard in once all that belongs to its step is on record; commit with the last one.

        Raises:
            FencedError: the run is another driver's now.
            StorageError: storage has refused too often.
        """
        if self._on_record(report.step):
            self._take(report, 1)
        else:
            self._held.append(report)

    def try_again(self) -> None:
        """Commit what storage has refused to, where it is time to."""
        now = time.monotonic()
        for key in [key for key, refused in self._refused.items() if refused.again_at <= now]:
            if (refused := self._refused.pop(key, None)) is not None:  # A later one may count by now.
                self._take(refused.report, refused.tries + 1)

    def needs_no_keeper(self, generation: int, step: int) -> bool:
        """Tell whether all of a checkpoint is in storage, and only its commit is not."""
        return (generation, step) in self._refused

    def _take(self, report: ShardWritten, tries: int) -> None:
        began = time.monotonic()
        try:
            manifest = self.commits.take(report)
        except FencedError:
            raise
        except StorageError as error:
            if tries == COMMIT_TRIES:
                self.failed(report.generation, report.step, str(error))
                return
            now = time.monotonic()
            # The driver does nothing else while it tries: at most half of its time goes into that.
            again_at = now + max(COMMIT_BACKOFF_S * 2 ** (tries - 1), now - began)
            self._refused[report.generation, report.step] = _Refused(report, tries, again_at, str(error))
            self.recorder.notice(f"step {report.step}: the checkpoint will be committed again: {error}")
            return
        if manifest is not None:
            for step in sorted(step for step in self._doubtful & self._due if step < manifest.step):
                self._give_up(step, WITH_KEEPER, counts=False)  # This one ends the row.
            for key in [key for key in self._refused if key[1] < manifest.step]:
                self._give_up(key[1], self._refused.pop(key).error, counts=False)
            self._due = {step for step in self._due if step > manifest.step}
            self.policy.saved()
            self.progress.committed = manifest.step
            self.task = replace(self.task, manifest=manifest, manifest_url="")
            self.recorder.committed(manifest.step)

    def take_held(self) -> None:
        """Take in what had to wait, now that more is on record."""
        held, self._held = self._held, []
        for shard in held:
            self.take(shard)

    def failed(self, generation: int, step: int, error: str) -> None:
        """Give a generation's checkpoint of a step up, of which a part could not be written.

        Raises:
            StorageError: storage has refused too often.
        """
        if step <= self.progress.committed or (generation, step) in self.given_up:
            return
        self.given_up[generation, step] = error
        self._give_up(step, error)

    def _give_up(self, step: int, error: str, counts: bool = True) -> None:
        self._due.discard(step)
        self.recorder.event(SaveFailure(time=time.time(), step=self.progress.step, cause=error))
        if counts and (over := self.policy.save_failed(error)) is not None:
            raise over.error
        self.recorder.notice(f"step {step}: the checkpoint could not be written ({error})")

    def fall_back(self, report: CheckpointDamaged) -> None:
        """Go on from the last checkpoint that is whole.

        Raises:
            DamagedError: there is none.
        """
        damaged = self.task.manifest
        if damaged is None:
            raise DamagedError(f"train.init={self.config.train.init}: {report.error}")
        if self.task.manifest_url:  # The replayed run's: it is not ours to go back in.
            raise DamagedError(f"{self.task.manifest_url}@{damaged.step}: {report.error}")
        if damaged.step != report.step:
            return  # Another rank has said so already.
        try:
            manifest = self.commits.fall_back(damaged)
        except DamagedError as error:
            raise DamagedError(f"{report.error}; {error}") from error
        self.task = replace(self.task, manifest=manifest)
        good = self.progress.committed = manifest.step if manifest else -1
        now = time.time()
        self.recorder.event(
            Fallback(time=now, step=self.progress.step, cause=report.error, damaged=damaged.step, good=good)
        )
        self.recorder.notice(f"{report.error}; going back to the checkpoint of step {good}")

    def _on_record(self, step: int) -> bool:
        """Tell whether all that belongs to a step has come: that goes on record before its checkpoint counts."""
        validated = self.progress.validated >= step or not self.task.validates(step) or step == self._as_it_is
        return self.progress.step >= step and validated
