"""Which checkpoints are kept, and what becomes of the others. The rules are pure; the janitor carries them out.

A deletion is in the log before the data goes, so that no reader is led to half a checkpoint. Files that the log does
not lead to are collected later; never anything newer than the newest commit, which may be on its way.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from orchestrator.log.run_log import Entry, FencedError, RunLog
from workers.checkpoint.manifest import MANIFESTS, SHARDS, Manifest, parse_place
from workers.common.errors import DamagedError, StorageError
from workers.common.storage import File
from workers.common.uploads import abort_old_uploads
from workers.config import CheckpointConfig


def expendable(
    commits: list[Entry], pinned: set[str], config: CheckpointConfig, ends: Collection[int] = ()
) -> list[Entry]:
    """Return the commits that nothing asks to keep, oldest first.

    Args:
        commits: that count, oldest first.
        pinned: manifests that are pinned.
        config: how many are kept.
        ends: the last steps of stages, which are kept.
    """
    if not config.keep_last:
        return []
    kept = {entry.manifest for entry in commits[-config.keep_last :]} | pinned
    kept |= {entry.manifest for entry in commits if entry.step in ends}
    if config.keep_every:
        kept |= {entry.manifest for entry in commits if entry.step % config.keep_every == 0}
    if config.keep_best:
        # NaN compares as neither lower nor higher: it would leave the others in the order in which they came.
        rated = [entry for entry in commits if math.isfinite(entry.metrics.get(config.keep_best_by, math.nan))]
        rated.sort(key=lambda entry: (entry.metrics[config.keep_best_by], entry.number))
        kept |= {entry.manifest for entry in rated[: config.keep_best]}
    return [entry for entry in commits if entry.manifest not in kept]


def leftovers(files: dict[str, File], led_to: set[str], newest_step: int, before: float) -> list[str]:
    """Return the files of dead attempts and deleted checkpoints.

    Args:
        files: in the folders of shards and manifests, by path.
        led_to: what the log leads to.
        newest_step: of the newest commit.
        before: seconds since the epoch; what was changed later may be on its way into a commit.
    """
    found = []
    for path, file in files.items():
        place = parse_place(path)
        if path not in led_to and place is not None and place[0] <= newest_step and file.modified < before:
            found.append(path)
    return sorted(found)


def delete(log: RunLog, commit: Entry, reason: str) -> bool:
    """Delete one checkpoint: the log first, then the manifest, then the shards.

    Returns:
        False if it is pinned: then it stays.

    Raises:
        StorageError: not all of it could be removed; what is left is collected later.
    """
    shards: Iterable[str] = ()
    with suppress(StorageError):  # A damaged manifest names nothing; its shards are leftovers.
        shards = [shard.path for shard in Manifest.read(log.store, commit.manifest, commit.sha256).shards]
    if not log.mark("delete", commit, reason):
        return False
    for path in (commit.manifest, *shards):
        log.store.remove(path)
    return True


def tidy(log: RunLog, config: CheckpointConfig, bad: set[str], now: float, ends: Collection[int] = ()) -> None:
    """Delete what is expendable, and collect what is left over.

    Args:
        log: of a run that this process leads.
        config: what is kept.
        bad: manifests that are known to be damaged: they do not count, and are left alone.
        now: seconds since the epoch.
        ends: the last steps of stages, which are kept.

    Raises:
        FencedError: another driver leads the run: whatever that one has written looks like a leftover from here.
        StorageError: something could not be removed; it is tried again next time.
    """
    log.check_lead()
    commits = [entry for entry in log.commits if entry.manifest not in bad]
    for entry in expendable(commits, log.pins, config, ends):
        delete(log, entry, "retention")
    collect_leftovers(log, now - config.grace_s)


class Janitor:
    """Deletes what is expendable, in a thread of its own, after each commit.

    Args:
        log: of the run that this process leads.
        config: what is kept.
        bad: manifests that are known to be damaged; they may become more. They do not count, and are left alone.
        notice: takes a line about what could not be removed.
        ends: the last steps of stages, which are kept.
    """

    def __init__(
        self,
        log: RunLog,
        config: CheckpointConfig,
        bad: set[str],
        notice: Callable[[str], object],
        ends: Collection[int] = (),
    ) -> None:
        self.log, self.config, self.bad, self.notice, self.ends = log, config, bad, notice, ends
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="janitor")

    def __enter__(self) -> "Janitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Finish what has been asked for."""
        self._ended = True
        self._wake.set()
        self._thread.join()

    def wake(self) -> None:
        """There is a new commit."""
        self._wake.set()

    def _work(self) -> None:
        ended = False
        while not ended:
            self._wake.wait()
            self._wake.clear()
            ended = self._ended  # Looked at before the work: what was asked for until then is done.
            try:
                tidy(self.log, self.config, self.bad, time.time(), self.ends)
            except FencedError:
                return  # The run is another driver's.
            except StorageError as error:
                self.notice(f"old checkpoints could not be removed: {error}")


def collect_leftovers(log: RunLog, before: float) -> int:
    """Remove files that the log does not lead to and that are older than a time; return how many."""
    commits = log.commits
    if not commits:
        return 0
    files = {**log.store.files(SHARDS), **log.store.files(MANIFESTS)}
    led_to: set[str] = set()
    for entry in commits:
        try:
            manifest = Manifest.read(log.store, entry.manifest, entry.sha256)
            led_to |= {entry.manifest, *(shard.path for shard in manifest.shards)}
        except DamagedError:  # Nobody knows what is its: everything of that place stays.
            led_to |= {path for path in files if parse_place(path) == parse_place(entry.manifest)}
    old = leftovers(files, led_to, max(entry.step for entry in commits), before)
    for path in old:
        log.store.remove(path)
    return len(old) + abort_old_uploads(log.store, before)
