"""The lease, with its seconds shortened."""

import os
import shutil
import time

import pytest

from orchestrator.log.lease import FILE, Holder, Lease, await_free
from orchestrator.log.run_log import FencedError, RunLog
from workers.common.errors import ClusterError, StorageError
from workers.common.storage import Store


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, seconds in (("LEASE_S", 1.0), ("RENEW_S", 0.1), ("LOOK_S", 0.05)):
        monkeypatch.setattr(f"orchestrator.log.lease.{name}", seconds)


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
    dead = Lease(store, strict=False)
    dead._write(held=True)
    began = time.monotonic()
    await_free(store)
    assert time.monotonic() - began >= 1.0


def test_whoever_takes_over_ends_the_other(tmp_path):
    store = Store(str(tmp_path))
    with Lease(store, strict=False) as first:
        await_change(store)
        first.check()
        with Lease(store, strict=False) as second:
            first._thread.join(10)
            with pytest.raises(FencedError, match="has taken this run over"):
                first.check()
            second.check()
            log = RunLog(store, first.check)
            with pytest.raises(FencedError):
                log.take_over({})
        assert log.entries == RunLog(store).entries == []
    assert Holder.read(store).writer == second.writer, "the first one's end does not touch what is not its own"


@pytest.mark.parametrize("strict", [True, False])
def test_without_storage_only_a_store_that_does_not_fence_stops_a_driver(tmp_path, strict):
    folder = tmp_path / "run"
    store = Store(str(folder))
    with Lease(store, strict=strict) as lease:
        await_change(store)
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_text("no folder any more")
        time.sleep(1.5)
        if strict:
            with pytest.raises(StorageError, match="could not be renewed for [12] s"):
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
