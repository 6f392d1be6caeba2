"""From shards to commits: a checkpoint counts when every rank's part of it is in storage."""

from collections.abc import Callable
from typing import Any

from orchestrator.run_log import RunLog
from workers.checkpoint.manifest import Manifest
from workers.reports import ShardWritten


class Commits:
    """Collects the shards of each step and commits it with the last of them.

    Args:
        log: the run's log.
        attempt: which the shards are of.
        identity: what a resumed run must share.
        world_size: shards of a checkpoint.
        before: called before each commit.
    """

    def __init__(
        self, log: RunLog, attempt: int, identity: dict[str, Any], world_size: int, before: Callable[[], object]
    ) -> None:
        self.log, self.attempt, self.identity, self.world_size = log, attempt, identity, world_size
        self.before = before
        self.waiting: dict[int, dict[int, ShardWritten]] = {}

    def take(self, report: ShardWritten) -> bool:
        """Tell whether this shard was its checkpoint's last, and the checkpoint now counts.

        Raises:
            StorageError: the checkpoint is incomplete, storage refuses, or another driver has taken over.
        """
        shards = self.waiting.setdefault(report.step, {})
        shards[report.rank] = report
        if len(shards) < self.world_size:
            return False
        del self.waiting[report.step]
        manifest = Manifest(
            run_id=self.log.store.url.rsplit("/", 1)[-1],
            attempt=self.attempt,
            step=report.step,
            world_size=self.world_size,
            identity=self.identity,
            counters=report.counters,
            shapes=report.shapes,
            shards=tuple(shards[rank].shard for rank in sorted(shards)),
        )
        self.before()
        self.log.commit(manifest)
        return True
