"""From shards to commits: a checkpoint counts when every rank's part of it is in storage."""

from collections.abc import Callable
from typing import Any

from orchestrator.log.run_log import RunLog
from workers.checkpoint.lineage import Lineage
from workers.checkpoint.manifest import Manifest
from workers.reports import ShardWritten


class Commits:
    """Collects the shards of each step and commits it with the last of them.

    The shards of a step come from the keepers of one generation; that generation may be over by then.

    Args:
        log: the run's log.
        attempt: which the shards are of.
        identity: what a resumed run must share.
        restored: where the attempt goes on from.
        before: called before each commit; returns what is known of the run at that step.
        lineage: tells what the checkpoint of a step comes from.
    """

    def __init__(
        self,
        log: RunLog,
        attempt: int,
        identity: dict[str, Any],
        restored: Manifest | None,
        before: Callable[[int], dict[str, float]],
        lineage: Callable[[int], Lineage | None] = lambda step: None,
    ) -> None:
        self.log, self.attempt, self.identity, self.before, self.lineage = log, attempt, identity, before, lineage
        self.after: Callable[[Manifest], object] = lambda manifest: None
        """Called after each commit."""
        self.waiting: dict[tuple[int, int], dict[int, ShardWritten]] = {}
        self.newest = 0, restored.step if restored else -1
        """Generation and step of the newest checkpoint; generation 0 stands for all of earlier attempts."""
        self.bad: set[str] = set()
        """Manifests of checkpoints that have turned out to be damaged."""

    def take(self, report: ShardWritten) -> Manifest | None:
        """Return the manifest if this shard was its checkpoint's last, and the checkpoint now counts.

        Raises:
            StorageError: the checkpoint is incomplete, storage refuses, or another driver has taken over.
        """
        if report.step <= self.newest[1]:  # Another generation has saved the same step once more.
            return None
        shards = self.waiting.setdefault((report.generation, report.step), {})
        shards[report.rank] = report
        if len(shards) < report.world_size:
            return None
        manifest = Manifest(
            run_id=self.log.run_id,
            attempt=self.attempt,
            generation=report.generation,
            step=report.step,
            world_size=report.world_size,
            identity=self.identity,
            counters=report.counters,
            shapes=shards[0].shapes,
            shards=tuple(shards[rank].shard for rank in sorted(shards)),
            lineage=self.lineage(report.step),
        )
        self.log.commit(manifest, self.before(report.step))
        self.newest = report.generation, report.step
        self.waiting = {key: shards for key, shards in self.waiting.items() if key[1] > report.step}
        self.after(manifest)
        return manifest

    def fall_back(self, damaged: Manifest) -> Manifest | None:
        """Give a damaged checkpoint up and return the newest one before it that can be read.

        Raises:
            DamagedError: there is none.
        """
        self.bad.add(damaged.path)
        good = self.log.newest_good(self.bad)
        if good is not None:
            self.newest = good.generation if good.attempt == self.attempt else 0, good.step
        return good
