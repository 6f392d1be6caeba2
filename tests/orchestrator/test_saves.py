"""Checkpoints of a real group over processes: damage, storage that fails or is slow, and what training makes of it."""

import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

from optim.config import OptimConfig
from orchestrator import controller, intake
from orchestrator.log.lease import await_free
from orchestrator.log.run_log import FencedError, RunLog
from orchestrator.record.events import Fallback, SaveFailure
from tests.faults import QuickKeeper
from tests.leading import Lead, config_of, tensors_of
from tests.orchestrator.test_recovery import assert_equal_states
from tests.processes import ProcessCluster
from workers.checkpoint.manifest import WEIGHT
from workers.common.errors import ClusterError, ConfigError, DamagedError, StorageError
from workers.common.storage import Store
from workers.config import StorageConfig
from workers.recipe import StageConfig

TWO = {"min_workers": 2, "max_workers": 2}
SHARD_MB = 0.19
"""Of the tiny model at two workers."""


def lead(folder, steps: int = 16, **changes) -> Lead:
    optim = OptimConfig(lr=1e-2, schedule="wsd", decay_fraction=0)  # So that a longer run begins as a shorter one does.
    settings = {"scaling": TWO, "train": {"steps": steps}, "checkpoint": {"every": 8}, "optim": optim, **changes}
    return Lead(config_of(folder, **settings), ProcessCluster({"a": 2}, keeper=QuickKeeper), folder)


def file_of(folder, step: int, which: str):
    """Return a file of a checkpoint: its log entry, its manifest, or a rank's shard."""
    log = RunLog(Store(str(folder / "run")))
    commit = log.find(step)
    match which:
        case "log entry":
            path = f"log/{commit.number:08d}.json"
        case "manifest":
            path = commit.manifest
        case _:
            path = log.manifest(step).shards[int(which[-1])].path
    return folder / "run" / path


def flip_a_byte(file) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 8 and 16, and what it comes to when it goes on to step 24."""
    folder = tmp_path_factory.mktemp("saved")
    with lead(folder) as first:
        assert first.wait().commits == [8, 16]
    whole = tmp_path_factory.mktemp("whole") / "copy"
    shutil.copytree(folder, whole)
    with lead(whole, steps=24) as second:
        assert [row.step for row in second.wait().rows] == [*range(17, 25)]
    return folder, whole


@pytest.mark.parametrize("which", ["log entry", "manifest", "shard 0", "shard 1"])
def test_one_flipped_byte_in_any_file_is_named_and_fallen_back_from(saved, tmp_path, which):
    folder, whole = saved
    harmed = tmp_path / "harmed"
    shutil.copytree(folder, harmed)
    file = file_of(harmed, 16, which)
    flip_a_byte(file)
    again = lead(harmed, steps=24)
    with again:
        notes = again.wait()
    found_by_worker = which.startswith("shard")
    # Steps that are trained again are on record already, where the driver knew of them.
    assert [row.step for row in notes.rows] == list(range(17 if found_by_worker else 9, 25))
    assert notes.commits[-1] == 24
    assert any(file.name in text and "damaged" in text for text in [*again.log.damaged, *notes.notices])
    assert [(event.damaged, event.good) for event in notes.of(Fallback)] == ([(16, 8)] if found_by_worker else [])
    assert_equal_states(whole, harmed)


def test_without_any_whole_checkpoint_nothing_is_begun_anew(tmp_path):
    with lead(tmp_path, steps=8) as first:
        first.wait()
    file = file_of(tmp_path, 8, "shard 1")
    flip_a_byte(file)
    second = lead(tmp_path, steps=12)
    with second, pytest.raises(DamagedError, match=f"{file.name}: damaged.*none of the 1 checkpoints is whole"):
        second.wait()
    assert second.notes.rows == []


def test_an_upload_that_fails_is_tried_again(tmp_path):
    blocked = tmp_path / "run" / "shards"
    blocked.parent.mkdir()
    blocked.write_text("in the way")
    one = lead(tmp_path, steps=60)

    def clear(*_) -> None:
        if blocked.is_file() and any("writes its shard again" in notice for notice in one.notes.notices):
            blocked.unlink()

    one.notes.on_step = clear
    with one:
        notes = one.wait()
    assert notes.commits[-1] == 60 and notes.faults == [] and len(notes.rows) == 60


class LateClock:
    """A time module, some hours late at times."""

    sleep, time = staticmethod(time.sleep), staticmethod(time.time)

    def __init__(self) -> None:
        self.late_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.late_s


@pytest.fixture
def clock(monkeypatch):
    """The clock of whoever waits for the last checkpoint."""
    late = LateClock()
    for module in (controller, intake):
        monkeypatch.setattr(module, "time", late)
    return late


def test_the_last_checkpoint_is_waited_for_as_long_as_something_comes(tmp_path, clock):
    """Its shards fail three times; between two tries passes more than half of what the driver waits in silence."""
    blocked = tmp_path / "run" / "shards"
    blocked.parent.mkdir()
    blocked.write_text("in the way")
    one = lead(tmp_path, steps=8, checkpoint={"every": 0})
    tries: list[str] = []

    def told(text: str) -> None:
        one.notes.notices.append(text)
        if "rank 0 writes its shard again" in text:
            tries.append(text)
            clock.late_s += 0.6 * controller.COMMIT_S
            if len(tries) == 3:
                blocked.unlink()

    one.notes.notice = told
    with one:
        notes = one.wait()
    assert len(tries) == 3 and notes.commits == [8]


def test_the_last_checkpoint_is_not_waited_for_in_silence(tmp_path, clock, monkeypatch):
    slow = StorageConfig(max_upload_mb_per_s=1e-6)
    one = lead(tmp_path, steps=8, checkpoint={"every": 0}, storage=slow)
    wait = controller.Controller._await_commit

    def pass_hours(*arguments) -> bool:
        one.pool.refresh = lambda: setattr(clock, "late_s", clock.late_s + controller.COMMIT_S / 10)
        return wait(*arguments)

    monkeypatch.setattr(controller.Controller, "_await_commit", pass_hours)
    with one, pytest.raises(StorageError, match="no part of it was written for 600 s"):
        one.wait()
    assert controller.COMMIT_S <= clock.late_s < 1.5 * controller.COMMIT_S


def test_a_commit_that_storage_refuses_is_tried_again(tmp_path):
    """The shards are there: the last checkpoint of a run must not be lost with one request."""
    folder, away = tmp_path / "run" / "log", tmp_path / "run" / "away"
    one = lead(tmp_path, steps=8, checkpoint={"every": 0})

    def refuse(step: int) -> None:
        if step == 7:
            folder.rename(away)
            folder.write_text("in the way")

    def told(text: str) -> None:
        one.notes.notices.append(text)
        if "will be committed again" in text:
            folder.unlink()
            away.rename(folder)

    one.notes.on_step, one.notes.notice = refuse, told
    with one:
        notes = one.wait()
    assert one.outcome == "finished" and notes.commits == [8] and notes.of(SaveFailure) == []
    assert sum("will be committed again" in text for text in notes.notices) == 1
    assert [entry.step for entry in RunLog(Store(f"{tmp_path}/run")).commits] == [8]


def test_a_commit_whose_answer_was_lost_counts_once(tmp_path, monkeypatch):
    one = lead(tmp_path, steps=8, checkpoint={"every": 0})
    create, lost = Store.create, []

    def lose_the_answer(store: Store, path: str, data: bytes) -> bool:
        made = create(store, path, data)
        if path.startswith("log/") and b'"commit"' in data and not lost:
            lost.append(path)
            raise StorageError("the answer was lost")
        return made

    monkeypatch.setattr(Store, "create", lose_the_answer)
    with one:
        notes = one.wait()
    assert len(lost) == 1 and notes.commits == [8]
    assert [entry.step for entry in RunLog(Store(f"{tmp_path}/run")).commits] == [8]


def test_training_goes_on_until_too_many_checkpoints_in_a_row_have_failed(tmp_path):
    blocked = tmp_path / "run" / "shards"
    blocked.parent.mkdir()
    blocked.write_text("in the way")
    one = lead(tmp_path, steps=100_000, recovery={"max_failed_saves": 1}, checkpoint={"every": 1})
    with one, pytest.raises(StorageError, match="2. checkpoint in a row that could not be written") as error:
        one.wait()
    assert "recovery.max_failed_saves=1" in str(error.value)
    failed = [event.step for event in one.notes.events if isinstance(event, SaveFailure)]
    assert failed and f"step {failed[0]}" not in str(error.value), "training went on after the first"
    assert one.notes.commits == [] and one.notes.faults == []


def test_where_storage_is_slower_than_checkpoints_come_some_are_left_out(tmp_path):
    slow = StorageConfig(max_upload_mb_per_s=2 * SHARD_MB)  # A shard takes half a second.
    stages = tuple(StageConfig(name=f"{end}", steps=20) for end in (20, 40, 60))
    one = lead(tmp_path, train={"steps": 0, "stages": stages}, checkpoint={"every": 2}, storage=slow)
    with one:
        notes = one.wait()
    left_out = [notice for notice in notes.notices if "earlier ones are still being written" in notice]
    assert left_out and len(left_out) + len(notes.commits) == 30
    assert {20, 40, 60} <= {*notes.commits}, "the end of a stage is no place for gaps"
    assert notes.commits[-1] == 60 and len(notes.rows) == 60 and notes.faults == []
    assert one.log.manifest().shards[0].size == pytest.approx(SHARD_MB * 1e6, rel=0.1)


def test_checkpoints_that_go_with_their_keepers_are_counted(tmp_path, soon):
    """Such a keeper may run out of memory at every save: a run for days must not end without a checkpoint."""
    slow = StorageConfig(max_upload_mb_per_s=0.01)
    one = lead(tmp_path, steps=600, checkpoint={"every": 20}, storage=slow, recovery={"max_failed_saves": 1})

    def kill_keeper(step: int) -> None:
        if step % 20 == 5 and step > 20 and (keeper := one.pool.keepers.get("a")) is not None:
            keeper.handle.kill()

    one.notes.on_step = kill_keeper
    with one, pytest.raises(StorageError, match="that is the 2. checkpoint in a row"):
        one.wait()
    # A loaded machine may not have the next keeper up in time for the next one, which is told in other words.
    causes = [failure.cause for failure in one.notes.of(SaveFailure)]
    assert len(causes) == 2 and "a part of it went with its keeper" in causes
    assert one.notes.faults == [] and one.notes.commits == []


def test_retention_beside_training(tmp_path):
    one = lead(tmp_path, steps=40, checkpoint={"every": 4, "keep_last": 2, "keep_every": 20, "grace_s": 0})
    with one:
        made = one.wait().commits
    log = RunLog(Store(str(tmp_path / "run")))
    kept = sorted({step for step in made if step % 20 == 0} | set(made[-2:]))
    assert [entry.step for entry in log.commits] == kept and len(made) > len(kept)
    assert len(log.store.files("shards")) == 2 * len(kept) and len(log.store.files("manifests")) == len(kept)


@pytest.mark.numeric
def test_a_run_begins_with_the_weights_of_another(tmp_path):
    """At another world size, without the optimizer's state; of another model it is refused."""
    with lead(tmp_path / "first", steps=6) as first:
        first.wait()
    origin = f"{tmp_path}/first/run"
    still = OptimConfig(lr=1e-8, weight_decay=0.0)
    one = {"min_workers": 1, "max_workers": 1}
    train = {"steps": 2, "init": f"{origin}@6", "validate_every": 1}
    with lead(tmp_path / "second", scaling=one, optim=still, train=train) as second:
        notes = second.wait()
    before, after = (tensors_of(f"{tmp_path}/{name}/run") for name in ("first", "second"))
    for (kind, name), tensor in before.items():
        if kind == WEIGHT:
            assert np.abs(after[kind, name] - tensor).max() < 1e-6, name
    assert first.notes.validations[-1].loss == pytest.approx(notes.validations[0].loss, rel=1e-6)
    other = replace(first.config.model, num_experts=4)
    with pytest.raises(
        ConfigError, match=r"is another model:\n  model.num_experts: the checkpoint has 6, the config 4"
    ):
        lead(tmp_path / "third", train=train, model=other)
    with pytest.raises(ConfigError, match="no committed checkpoint of step 5"):
        lead(tmp_path / "third", train={**train, "init": f"{origin}@5"})
    file = file_of(tmp_path / "first", 6, "shard 0")
    flip_a_byte(file)
    with (
        lead(tmp_path / "fourth", train=train) as fourth,
        pytest.raises(DamagedError, match=f"train.init=.*{file.name}: damaged"),
    ):
        fourth.wait()
    assert fourth.notes.rows == [] and fourth.log.commits == []


def test_two_drivers_of_one_run(tmp_path):
    """The second is refused; with a take-over the first one ends, and nothing that it writes counts any more."""
    keep_all = {"every": 4, "keep_last": 0}
    first = lead(tmp_path, steps=100_000, checkpoint=keep_all)
    second: list[Lead] = []

    def take_over(step: int) -> None:
        if first.notes.commits and not second:
            with pytest.raises(ClusterError, match="leads this run.*--takeover"):
                await_free(first.log.store)
            second.append(lead(tmp_path, steps=40, checkpoint=keep_all))

    first.notes.on_step = take_over
    with first:
        with pytest.raises(FencedError):
            first.wait()
        with second[0]:
            notes = second[0].wait()
    assert notes.commits[-1] == 40 and notes.faults == []
    log = RunLog(Store(str(tmp_path / "run")))
    taken = next(entry.number for entry in log.entries if entry.kind == "take_over" and entry.attempt == 2)
    assert {entry.attempt for entry in log.entries if entry.number > taken} == {2}
    kept = [entry.step for entry in log.commits if entry.attempt == 1]
    assert notes.rows[0].step == kept[-1] + 1, "the second went on from the first one's last commit"
