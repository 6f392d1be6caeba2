import json
from dataclasses import replace

import pytest

from orchestrator.log.run_log import FencedError, RunLog
from tests.workers.test_checkpoint import save
from workers.common.errors import DamagedError, StorageError
from workers.common.storage import Store


def test_take_over_commit_and_read_back(tmp_path):
    store = Store(str(tmp_path))
    log = RunLog(store)
    assert log.attempt == 0 and log.manifest() is None
    assert log.take_over({}) == 1
    manifest = save(store, 2)
    log.commit(manifest)
    again = RunLog(store)
    assert again.manifest() == manifest and again.manifest(step=7) == manifest and again.manifest(step=8) is None
    assert again.take_over({}) == 2
    assert [entry.kind for entry in RunLog(store).entries] == ["take_over", "commit", "take_over"]


def test_a_driver_that_was_overtaken_is_fenced(tmp_path):
    store = Store(str(tmp_path))
    first, second = RunLog(store), None
    first.take_over({})
    second = RunLog(store)
    assert second.take_over({}) == 2
    with pytest.raises(StorageError, match="fenced"):
        first.commit(save(store, 1))
    assert RunLog(store).commits == [], "nothing that it wrote counts"
    with pytest.raises(StorageError, match="fenced"):
        first.take_over({})


def test_shards_without_a_commit_do_not_exist_for_a_reader(tmp_path):
    store = Store(str(tmp_path))
    RunLog(store).take_over({})
    manifest = save(store, 2)
    store.create(manifest.path, manifest.encode())
    assert RunLog(store).manifest() is None


def test_foreign_entries_are_refused(tmp_path):
    store = Store(str(tmp_path))
    store.create("log/00000001.json", json.dumps({"format": "raymuon-log-9"}).encode())
    with pytest.raises(StorageError, match="raymuon-log-9"):
        RunLog(store)


@pytest.mark.parametrize("harm", ["cut", "flip", "not json"])
def test_a_damaged_entry_does_not_count_and_is_named(tmp_path, harm):
    store = Store(str(tmp_path))
    log = RunLog(store)
    log.take_over({})
    log.commit(save(store, 2))
    path = tmp_path / "log" / "00000002.json"
    data = path.read_bytes()
    flipped = data.replace(b'"step": 7', b'"step": 3')
    path.write_bytes({"cut": data[:-10], "flip": flipped, "not json": b"not json"}[harm])
    again = RunLog(store)
    assert again.manifest() is None and "log/00000002.json" in again.damaged[0]
    assert again.take_over({}) == 3, "it may have been a take-over"
    assert [entry.number for entry in again.entries] == [1, 3]


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    store = Store(str(tmp_path))
    log = RunLog(store)
    log.take_over({})
    first = save(store, 2)
    log.commit(first)
    second = replace(first, step=8)
    log.commit(second)
    assert log.newest_good() == second and log.newest_good({second.path}) == first
    (tmp_path / second.path).write_bytes(b"x")
    assert RunLog(store).newest_good() == first
    with pytest.raises(DamagedError, match="none of the 2 checkpoints is whole"):
        RunLog(store).newest_good({first.path})


def test_a_persons_pin_moves_the_driver_on_and_does_not_fence_it(tmp_path):
    store = Store(str(tmp_path))
    driver = RunLog(store)
    driver.take_over({})
    driver.commit(save(store, 2))
    person = RunLog(store)
    person.mark("pin", person.commits[0], "good one")
    driver.commit(replace(save(store, 2), step=9))
    assert [(e.number, e.kind) for e in RunLog(store).entries][2:] == [(3, "pin"), (4, "commit")]
    assert driver.pins == {driver.commits[0].manifest}
    person.mark("unpin", person.commits[0], "")
    assert RunLog(store).pins == set()
    RunLog(store).take_over({})
    with pytest.raises(FencedError):
        driver.mark("delete", driver.commits[1], "retention")


def test_a_shard_that_only_its_writer_can_see_is_not_committed(tmp_path):
    log = RunLog(Store(str(tmp_path / "driver")))
    log.take_over({})
    manifest = save(Store(str(tmp_path / "another node's disk")), 2)
    with pytest.raises(StorageError, match="finds nothing there; checkpoint.url must be one place for all nodes"):
        log.commit(manifest)
    assert RunLog(log.store).manifest() is None


def test_the_identity_of_a_run_is_known_from_its_first_take_over(tmp_path):
    store = Store(str(tmp_path))
    assert RunLog(store).identity is None
    RunLog(store).take_over({"seed": 3})
    assert RunLog(store).identity == {"seed": 3}
