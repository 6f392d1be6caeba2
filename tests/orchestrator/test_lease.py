"""The lease, which is renewed every moment, and whose seconds the test lets pass."""

import os
import shutil
import threading
import time
from contextlib import suppress

import pytest

from orchestrator.log import lease
from orchestrator.log.lease import FILE, LEASE_S, Holder, Lease, await_free
from orchestrator.log.run_log import FencedError, RunLog
from workers.common.errors import ClusterError, StorageError
from workers.common.storage import Store


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("RENEW_S", "LOOK_S"):
        monkeypatch.setattr(f"orchestrator.log.lease.{name}", 0.01)


class Clock:
    """Whoever sleeps by it lets its seconds pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def await_change(store: Store) -> None:
    first = Holder.read(store)
    while Holder.read(store) == first:
        time.sleep(0.01)


def test_a_run_that_has_ended_is_free_at_once(tmp_path):
    store = Store(str(tmp_path))
    await_free(store, sleep=pytest.fail)
    with Lease(store, strict=False):
        assert Holder.read(store).held
    assert not Holder.read(store).held
    await_free(store, sleep=pytest.fail)


def test_a_run_with_a_driver_is_refused_and_the_driver_is_named(tmp_path):
    store = Store(str(tmp_path))
    with Lease(store, strict=False), pytest.raises(ClusterError, match=rf"process {os.getpid()} on .*--takeover"):
        await_free(store)


def test_a_driver_that_was_killed_is_waited_for(tmp_path):
    store = Store(str(tmp_path))
    dead, clock = Lease(store, strict=False), Clock()
    dead._write(held=True)
    await_free(store, clock.sleep, clock)
    assert LEASE_S <= clock.now < LEASE_S + 1


def test_whoever_takes_over_ends_the_other(tmp_path):
    store = Store(str(tmp_path))
    with Lease(store, strict=False) as first:
        await_change(store)
        first.check()
        with Lease(store, strict=False) as second:
            first._thread.join(60)
            with pytest.raises(FencedError, match="has taken this run over"):
                first.check()
            second.check()
            log = RunLog(store, first.check)
            with pytest.raises(FencedError):
                log.take_over({})
        assert log.entries == RunLog(store).entries == []
    assert Holder.read(store).writer == second.writer, "the first one's end does not touch what is not its own"


def test_whoever_is_overwritten_in_the_moment_of_a_takeover_still_ends_the_other(tmp_path, monkeypatch):
    """The first one has looked before the second one came, and writes after it: a slow store, a stopped process."""
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    store = Store(str(tmp_path))
    with Lease(store, strict=False) as first, Lease(store, strict=False) as second:
        first._write(held=True)
        first._thread.join(60)
        with pytest.raises(FencedError, match="has taken this run over"):
            first.check()
        second.check()
    assert Holder.read(store).writer == second.writer


@pytest.mark.parametrize("strict", [True, False])
def test_without_storage_only_a_store_that_does_not_fence_stops_a_driver(tmp_path, strict):
    folder, clock = tmp_path / "run", Clock()
    store, tries = Store(str(folder)), threading.Semaphore(0)
    with Lease(store, strict, clock) as lease:
        await_change(store)
        look = lease._is_taken

        def watched() -> bool:
            try:
                return look()
            finally:
                tries.release()

        lease._is_taken = watched
        while not folder.is_file():  # A renewal in between makes it anew.
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(IsADirectoryError):
                folder.write_text("no folder any more")
        while tries.acquire(blocking=False):
            pass
        for _ in range(2):
            assert tries.acquire(timeout=60), "nobody tries to renew it"
        lease.check()
        clock.sleep(LEASE_S + 1)
        if strict:
            with pytest.raises(StorageError, match=f"could not be renewed for {LEASE_S + 1:.0f} s"):
                lease.check()
        else:
            lease.check()
        folder.unlink()
        await_change(store)
        await_change(store)
        lease.check()


def test_a_lease_that_nobody_can_read_is_nobodys(tmp_path):
    (tmp_path / FILE).write_text("{")
    await_free(Store(str(tmp_path)), sleep=pytest.fail)
