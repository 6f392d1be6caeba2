import json

import pytest

from orchestrator.run_log import RunLog
from tests.workers.test_checkpoint import save
from workers.errors import StorageError
from workers.storage import Store


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
    other = Store(str(tmp_path / "other"))
    other.create("log/00000001.json", b"not json")
    with pytest.raises(StorageError, match="not an entry"):
        RunLog(other)


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
