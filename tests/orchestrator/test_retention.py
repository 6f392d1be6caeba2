"""Which checkpoints stay; the log is told first; nothing that may be on its way is touched."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.log.retention import Janitor, collect_leftovers, expendable, leftovers
from orchestrator.log.run_log import Entry, RunLog
from tests.workers.test_checkpoint import save
from workers.common.storage import File, Store
from workers.config import CheckpointConfig


def commits(**val_losses: float) -> list[Entry]:
    """`s10=2.5`: a commit of step 10 with that validation loss; nan for none."""
    found = []
    for number, (name, loss) in enumerate(val_losses.items()):
        metrics = {"val_loss": loss} if loss == loss else {}
        about = {"kind": "commit", "attempt": 1, "writer": "w", "time": 0.0, "metrics": metrics}
        found.append(Entry(number=number, step=int(name[1:]), manifest=name, **about))
    return found


NAN = float("nan")
RUN = commits(s10=3.0, s20=2.0, s30=NAN, s40=2.5, s50=2.0, s60=4.0)


@pytest.mark.parametrize(
    ("keep", "pinned", "gone"),
    [
        ({"keep_last": 0}, set(), []),
        ({"keep_last": 2}, set(), [10, 20, 30, 40]),
        ({"keep_last": 9}, set(), []),
        ({"keep_last": 1, "keep_every": 20}, set(), [10, 30, 50]),
        ({"keep_last": 1, "keep_best": 1}, set(), [10, 30, 40, 50]),  # Of equal ones the first.
        ({"keep_last": 1, "keep_best": 3}, set(), [10, 30]),
        ({"keep_last": 1}, {"s30", "s10"}, [20, 40, 50]),
        ({"keep_last": 1, "keep_best": 2, "keep_best_by": "loss"}, set(), [10, 20, 30, 40, 50]),
    ],
)
def test_what_nothing_asks_to_keep_goes(keep, pinned, gone):
    assert [entry.step for entry in expendable(RUN, pinned, CheckpointConfig(**keep))] == gone


@given(st.lists(st.none() | st.floats(), max_size=12), st.integers(0, 12))
def test_the_best_are_the_lowest_numbers_in_whatever_order_they_come(losses, keep_best):
    """The values, not the order in which they came, decide; what is not a number, infinite or missing is never best."""
    about = {"kind": "commit", "attempt": 1, "writer": "w", "time": 0.0}
    rated = [
        Entry(number=number, step=number, manifest=f"{number}", metrics={} if loss is None else {"loss": loss}, **about)
        for number, loss in enumerate(losses)
    ]
    newest = Entry(number=99, step=99, manifest="newest", **about)
    config = CheckpointConfig(keep_last=1, keep_best=keep_best, keep_best_by="loss")
    gone = expendable([*rated, newest], set(), config)
    kept = [entry.metrics.get("loss") for entry in rated if entry not in gone]
    finite = sorted(loss for loss in losses if loss is not None and math.isfinite(loss))
    assert sorted(kept) == finite[:keep_best]


def test_leftovers_are_old_and_not_newer_than_the_newest_commit():
    files = {
        "shards/00000010-0001-0001/00000-a.safetensors": File(1, 50.0),
        "shards/00000010-0001-0001/.00000-b.safetensors.0f": File(1, 50.0),
        "shards/00000020-0001-0001/00000-c.safetensors": File(1, 50.0),
        "shards/00000020-0001-0001/00000-young.safetensors": File(1, 150.0),
        "shards/00000030-0001-0001/00000-on-its-way.safetensors": File(1, 50.0),
        "manifests/00000010-0001-0001.json": File(1, 50.0),
        "manifests/00000020-0001-0001.json": File(1, 50.0),
        "notes/of-somebody.txt": File(1, 50.0),
    }
    led_to = {"manifests/00000020-0001-0001.json", "shards/00000020-0001-0001/00000-c.safetensors"}
    assert leftovers(files, led_to, newest_step=20, before=100.0) == [
        "manifests/00000010-0001-0001.json",
        "shards/00000010-0001-0001/.00000-b.safetensors.0f",
        "shards/00000010-0001-0001/00000-a.safetensors",
    ]


def test_the_janitor_leaves_what_is_damaged_and_the_log_tells_what_went(tmp_path):
    store, told = Store(str(tmp_path)), []
    log = RunLog(store)
    log.take_over({})
    manifests = [save(store, 2, step) for step in (10, 20, 30, 40)]
    log.commit(manifests[0])
    with Janitor(log, CheckpointConfig(keep_last=1, grace_s=0), {manifests[0].path}, told.append) as janitor:
        for manifest in manifests[1:]:
            log.commit(manifest)
            janitor.wake()
            time.sleep(0.05)
    assert told == [] and [entry.step for entry in RunLog(store).commits] == [10, 40]
    assert [entry.step for entry in RunLog(store).entries if entry.kind == "delete"] == [20, 30]
    kept = {manifests[i].path for i in (0, 3)} | {shard.path for i in (0, 3) for shard in manifests[i].shards}
    assert {*store.files("shards"), *store.files("manifests")} == kept
    assert len(store.names("shards")) == 2, "no empty folder is left"


def test_what_a_damaged_manifest_led_to_is_left_alone(tmp_path):
    store = Store(str(tmp_path))
    log = RunLog(store)
    log.take_over({})
    good, bad, dead = save(store, 2, 10), save(store, 2, 20), save(store, 2, 15)
    log.commit(good)
    log.commit(bad)
    (tmp_path / bad.path).write_bytes(b"x")
    assert collect_leftovers(log, time.time() + 1) == 2
    assert set(store.files("shards")) == {shard.path for manifest in (good, bad) for shard in manifest.shards}
    assert not set(store.files("shards")) & {shard.path for shard in dead.shards}
    assert RunLog(store).manifest(10) == good
