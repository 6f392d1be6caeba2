"""The commit protocol against a store that stops anywhere: a reader finds the old checkpoint or the new one, whole."""

import time

import numpy as np
import pytest

from orchestrator.log.commits import Commits
from orchestrator.log.retention import tidy
from orchestrator.log.run_log import FencedError, RunLog
from tests.crashing import MODES, Crash, CrashingS3, Mode, small_parts  # noqa: F401
from workers.checkpoint.manifest import TensorSlice, place_of
from workers.checkpoint.shards import CheckpointReader, write_shard
from workers.common.errors import StorageError
from workers.common.storage import Store
from workers.config import CheckpointConfig
from workers.reports import ShardWritten

URL = "crashing://bucket/run"
WORLD, SIZE = 2, 100
KINDS = ("weight", "momentum_buffer")
KEEP = CheckpointConfig(keep_last=1, grace_s=0)


def truth(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal(SIZE, np.float32)


class Driver:
    """One driver's attempt, with its ranks' keepers, as the controller would lead it."""

    def __init__(self) -> None:
        self.store = Store(URL)
        self.log = RunLog(self.store)
        manifest = self.log.newest_good()
        self.attempt = self.log.take_over({})
        self.commits = Commits(self.log, self.attempt, {}, manifest, lambda step: {"loss": float(step)})
        self.step = manifest.step if manifest else 0

    def save(self) -> bool:
        """Write the next step's checkpoint; tell whether it counts."""
        self.step += 1
        values, part = truth(self.step), SIZE // WORLD
        for rank in range(WORLD):
            start = rank * part
            tensors = {TensorSlice(kind, "w", start, part): values[start : start + part] for kind in KINDS}
            shard = write_shard(self.store, place_of(self.step, self.attempt, 1), rank, tensors)
            manifest = self.commits.take(
                ShardWritten(
                    generation=1,
                    rank=rank,
                    time=time.time(),
                    step=self.step,
                    world_size=WORLD,
                    shard=shard,
                    counters={"step": self.step},
                    shapes={"w": [SIZE]},
                )
            )
        assert manifest is not None
        return True

    def clean(self) -> None:
        """As the janitor does."""
        tidy(self.log, KEEP, set(), time.time() + 1)


def newest_step() -> int:
    """Read the newest checkpoint as anybody would, and check every byte of it; 0 where there is none."""
    store = Store(URL)
    log = RunLog(store)
    assert log.damaged == []
    manifest = log.manifest()
    if manifest is None:
        return 0
    for commit in log.commits:
        reader = CheckpointReader(store, log.manifest(commit.step))
        for kind in KINDS:
            assert reader.tensor(kind, "w").tobytes() == truth(commit.step).tobytes(), (commit.step, kind)
    return manifest.step


def run_until_crash(steps: int) -> tuple[int, int, int]:
    """Lead a run; return the last step that its driver knows to count, the one in flight, and how many saves failed."""
    known, flying, failed = 0, 0, 0
    try:
        driver = Driver()
        for _ in range(steps):
            flying = driver.step + 1
            try:
                driver.save()
                known = flying
                driver.clean()
            except FencedError:
                raise
            except StorageError:
                failed += 1
    except Crash:
        pass
    except FencedError:
        raise
    except StorageError:
        failed += 1
    return known, flying, failed


def fresh() -> CrashingS3:
    CrashingS3.current = CrashingS3()
    return CrashingS3.current


def count_operations() -> int:
    store = fresh()
    assert run_until_crash(3) == (3, 3, 0)
    points = store.operations
    assert newest_step() == 3
    return points


@pytest.mark.parametrize("mode", MODES)
def test_at_every_point_a_reader_finds_the_old_or_the_new_checkpoint(mode: Mode):
    points = count_operations()
    assert points > 60
    for point in range(1, points + 1):
        store = fresh()
        store.plan = point, mode
        known, flying, failed = run_until_crash(3)
        where = f"{mode} operation {point}: {store.log[point - 1]}"
        store.plan, store.dead = None, False
        if mode in ("lost reply", "error"):
            # One operation that fails costs one checkpoint at most; the first ones are the driver's start.
            assert failed <= 1 and (known >= 2 or flying == 0), where
        found = newest_step()
        assert found in (known, max(known, flying)), where
        # Another driver goes on from there, and in the end nothing is left over.
        driver = Driver()
        assert driver.step == found, where
        driver.save()
        driver.clean()
        assert newest_step() == found + 1, where
        driver.save()
        driver.clean()
        held = [path for path in store.objects if "/shards/" in path or "/manifests/" in path]
        assert len(held) == WORLD + 1 and store.uploads == {}, (where, held)


def test_two_drivers_of_one_run_and_nothing_of_the_first_counts_any_more():
    store = fresh()
    first = Driver()
    first.save()
    second = Driver()
    second.save()
    with pytest.raises(FencedError):
        first.save()
    with pytest.raises(FencedError):
        first.log.mark("delete", first.log.commits[0], "retention")
    assert newest_step() == 2 and RunLog(Store(URL)).manifest().attempt == 2
    assert any("-0001-" in path and "/shards/00000002" in path for path in store.objects), "the shards that it wrote"
    second.save()
    second.clean()
    assert not any("-0001-" in path for path in store.objects), "are collected"
