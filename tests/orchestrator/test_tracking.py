"""Against a real SQLite store."""

import json
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.config import RunConfig, RunInfo, TrackingConfig, absolute, database_files
from orchestrator.identity import identity
from orchestrator.log.run_log import RunLog
from orchestrator.preflight import Found, find_run, run_store
from orchestrator.reach import reach_tracking
from orchestrator.record import mlflow_client
from orchestrator.record.events import Fallback, Membership, Tally
from orchestrator.record.journal import Journal
from orchestrator.record.metrics import NAMES, newest, published
from orchestrator.record.provenance import provenance
from orchestrator.record.recorder import RunRecorder, trained_otherwise
from orchestrator.record.registry import register
from orchestrator.record.report import Links
from orchestrator.record.start import Start
from orchestrator.record.tracking import RunRecord, Tracking, look_up, read_artifact
from orchestrator.record.watcher import Watcher
from tests.leading import config_of
from tests.processes import ProcessHandle
from tests.workers.test_moonlight import TINY
from workers.checkpoint.manifest import WEIGHT, Manifest, TensorSlice, place_of
from workers.checkpoint.shards import write_shard
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.config import CheckpointConfig
from workers.data.prepare import prepare
from workers.recipe import StageConfig
from workers.reports import Planned, StepDone, Validated


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    return Tracking(TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"))


def rows(tracking, run_id, metric):
    return [(m.step, m.value) for m in tracking.client.get_metric_history(run_id, published(metric))]


def test_each_step_is_logged_once_over_drivers(tracking):
    run_id = tracking.create("once", {"seed": 0})
    first = RunRecord(tracking, run_id)
    for step in range(1, 8):
        first.log("train", step, 1000.0 + step, {"loss": float(step), "lr": 0.1})
    first.log("validation", 4, 1004.5, {"val_loss": 4.5})
    first.close("FAILED")
    second = RunRecord(tracking, run_id)
    assert second.marks == {"train": 7, "validation": 4}
    for step in range(4, 11):  # Steps 4 to 7 are trained again after the fault.
        second.log("train", step, 2000.0 + step, {"loss": float(step), "lr": 0.1})
    second.log("validation", 4, 2004.5, {"val_loss": 4.5})
    second.close("FINISHED")
    assert sorted(rows(tracking, run_id, "loss")) == [(step, float(step)) for step in range(1, 11)]
    assert rows(tracking, run_id, "val_loss") == [(4, 4.5)]
    history = tracking.client.get_metric_history(run_id, "loss/train")
    assert {m.step: m.timestamp for m in history}[3] == 1003_000, "the time at which the step happened"
    assert tracking.client.get_run(run_id).info.status == "FINISHED"


def test_what_is_compared_leads_in_mlflow():
    """MLflow's UI orders groups of charts by name, and names without a group come last."""
    measured = [
        "bytes_sent/reduce",
        "attention/max_logit",
        "seconds/optimizer",
        "update_rms/router",
        "svd_entropy/head",
    ]
    names = [published(name) for name in (*NAMES, *measured)]
    groups = sorted({name.rpartition("/")[0] for name in names})
    assert groups[:4] == ["loss", "optim", "performance", "run"] and groups[-1] == "traffic"
    assert all(group.startswith("telemetry/") for group in groups[4:-1]) and len(set(names)) == len(names)
    assert published("system/ab/cpu_utilization_percentage") == "system/ab/cpu_utilization_percentage"


def test_a_run_of_before_names_had_groups_is_gone_on_with(tracking):
    run_id = tracking.create("old", {})
    for step in range(1, 4):
        tracking.client.log_metric(run_id, "loss", 10.0 - step, step=step)
    tracking.client.log_metric(run_id, "val_loss", 9.5, step=2)
    record = RunRecord(tracking, run_id)
    assert record.marks == {"train": 3, "validation": 2}
    for step in range(2, 6):
        record.log("train", step, 1.0, {"loss": 10.0 - step, "tokens": 8 * step})
    record.close("FINISHED")
    assert record.history("loss") == [(step, 10.0 - step) for step in range(1, 6)]
    assert rows(tracking, run_id, "loss") == [(4, 6.0), (5, 5.0)]
    logged = tracking.client.get_run(run_id).data.metrics
    assert newest({"tokens": 1.0}, "tokens") == 1.0 and newest(logged, "tokens") == 40 and newest(logged, "lr") is None


class _Nobody(Watcher):
    pass


def recorder_of(record: RunRecord, folder, **train) -> RunRecorder:
    links, journal = Links(str(folder), 10, provenance(), "", ""), Journal(Store(str(folder)), 1)
    return RunRecorder(config_of(folder, train=train), record, journal, _Nobody(), links, 10, Tally(0.0), [], Start())


def done(step: int, **values) -> StepDone:
    rest = dict.fromkeys(("seconds", "lr", "grad_norm", "expert_imbalance", "snapshot_seconds"), 1.0)
    rest |= {"generation": 1, "rank": 0, "time": float(step), "skipped": 0, "snapshot_every": 1}
    return StepDone(**{**rest, "loss": 10.0 - step, "tokens": 70 * step, "step_tokens": 70 + step, **values}, step=step)


def formed(generation: int, step: int, world_size: int, **chosen: object) -> Membership:
    of = {"generation": generation, "world_size": world_size, "previous_world_size": 0, "reason": "start"}
    where = {"nodes": ("a",) * world_size, "pids": (), "source": "start", "restored_step": step}
    return Membership(time=float(step), step=step, **of, **where, chosen=chosen)


def test_mlflow_tells_how_each_generation_saves_memory(tracking, tmp_path):
    """Params never change; what is automatic does with each generation, and what is given with each attempt."""
    run_id, automatic = tracking.create("automatic", {}), {"micro_batch": 0, "recompute": "auto", "logits": "auto"}
    record = RunRecord(tracking, run_id)
    recorder = recorder_of(record, tmp_path, **automatic)
    recorder.event(formed(1, 0, 4, micro_batch=4, recompute="none", logits="whole"))
    for step in (1, 2):
        recorder.step(done(step), 4)
    recorder.event(formed(2, 2, 1, micro_batch=2, recompute="1", logits="chunked"))
    record.close("FAILED")
    tags = tracking.client.get_run(run_id).data.tags
    assert tags["mlflow.note.content"].endswith("micro_batch=2, recompute=1, logits=chunked |")
    record = RunRecord(tracking, run_id)
    recorder = recorder_of(record, tmp_path, **{**automatic, "micro_batch": 2, "recompute": "all"})
    recorder.event(formed(1, 1, 2, logits="whole"))
    for step in (2, 3, 4):  # The first of them is on record.
        recorder.step(done(step), 2)
    record.close("FINISHED")
    assert rows(tracking, run_id, "micro_batch") == [(1, 4.0), (3, 2.0)]
    assert rows(tracking, run_id, "recomputed_layers") == [(1, 0.0), (3, TINY.num_layers)]
    assert rows(tracking, run_id, "chunked_logits") == [(1, 0.0), (3, 0.0)]
    tags = tracking.client.get_run(run_id).data.tags
    given = {key: tags[f"raymuon.train.{key}"] for key in ("micro_batch", "recompute", "logits")}
    assert given == {"micro_batch": "2", "recompute": "all", "logits": "whole"}


@pytest.mark.parametrize("submitted", [True, False])
def test_the_plan_of_the_group_does_not_replace_that_of_the_submitter(tracking, tmp_path, submitted):
    run_id = tracking.create("planned", {})
    if submitted:
        tracking.keep(run_id, "plan.json", '{"days": 3}')
    record = RunRecord(tracking, run_id)
    recorder = recorder_of(record, tmp_path)
    recorder.report(Planned(generation=1, rank=0, time=0.0, figures={"matrices": 71}))
    recorder.close(1.0)
    record.close("FINISHED")
    kept = json.loads(read_artifact(tracking.uri, run_id, "plan.json"))
    assert kept == ({"days": 3} if submitted else {"matrices": 71})


def test_a_checkpoint_has_the_losses_of_its_own_step_however_late_it_counts(tracking, tmp_path):
    run_id = tracking.create("late", {})
    record = RunRecord(tracking, run_id)
    recorder = recorder_of(record, tmp_path)
    for step in range(1, 8):
        recorder.step(done(step), 1)
        if step == 3:
            recorder.report(Validated(generation=1, rank=0, time=3.0, step=3, loss=7.5))
    assert recorder.before_commit(3) == {"loss": 7.0, "val_loss": 7.5}, "the upload took four steps"
    assert recorder.before_commit(6) == {"loss": 4.0}
    record.close("FINISHED")
    assert rows(tracking, run_id, "tokens_per_second") == [(step, 70.0 + step) for step in range(1, 8)], "of each step"


STAGES = StageConfig(name="early", steps=4, schedule="constant"), StageConfig(name="late", steps=4, global_batch=24)


def test_the_stage_is_told_also_where_a_driver_begins_with_its_first_step(tracking, tmp_path):
    """Whatever happens, such as a recovery, is told before the step that it was about."""
    run_id = tracking.create("staged", {"seed": 0})
    for steps, stage in (((3, 4), "early"), ((5, 6), "late"), ((7,), "late")):
        record = RunRecord(tracking, run_id)
        recorder = recorder_of(record, tmp_path, steps=0, stages=STAGES)
        recorder.event(Fallback(time=1.0, step=steps[0], cause="", damaged=0, good=0))
        for step in steps:
            recorder.step(done(step), 2)
        record.close("KILLED")
        assert tracking.client.get_run(run_id).data.tags["raymuon.stage"] == stage
    assert rows(tracking, run_id, "stage") == [(3, 1), (4, 1), (5, 2), (6, 2), (7, 2)]
    assert rows(tracking, run_id, "global_batch") == [(3, 12), (4, 12), (5, 24), (6, 24), (7, 24)]


def test_steps_on_record_that_are_trained_again_with_another_batch_are_told(tracking, tmp_path):
    run_id = tracking.create("changed", {"seed": 0})
    record = RunRecord(tracking, run_id)
    recorder = recorder_of(record, tmp_path, steps=0, stages=STAGES)
    for step in range(1, 8):
        recorder.step(done(step, lr=recorder.config.recipe.learning_rate(step)), 2)
    record.close("FAILED")
    record = RunRecord(tracking, run_id)
    assert trained_otherwise(recorder.config, record, 3) == ""
    early, late = STAGES
    batch = recorder_of(record, tmp_path, steps=0, stages=(replace(early, steps=6), replace(late, steps=2))).config
    assert trained_otherwise(batch, record, 3).startswith("steps 5 to 6 were trained with another")
    rate = recorder_of(record, tmp_path, steps=0, stages=(early, replace(late, schedule="linear"))).config
    assert trained_otherwise(rate, record, 3).startswith("steps 5 to 7 were trained with another")
    assert trained_otherwise(rate, record, 7) == ""
    record.abandon()


def test_more_rows_than_one_batch_takes(tracking):
    run_id = tracking.create("many", {})
    record = RunRecord(tracking, run_id)
    names = ["loss", *(f"metric/{number}" for number in range(40))]
    for step in range(1, 70):
        record.log("train", step, float(step), dict.fromkeys(names, 1.0))
    record.close("FINISHED")
    for metric in names:
        assert len(rows(tracking, run_id, metric)) == 69


def test_finding_a_run_to_go_on_with(tracking):
    done, open_ = tracking.create("it's a name", {"seed": 0}), tracking.create("it's a name", {"seed": 0})
    RunRecord(tracking, done).close("FINISHED")
    assert tracking.unfinished("it's a name") == open_
    assert tracking.unfinished("another") is None
    assert tracking.find(done) == done and tracking.find("it's a name") in (done, open_)
    with pytest.raises(ConfigError, match="no run of that id or name"):
        tracking.find("nobody")


def test_a_run_that_nobody_knows_of_is_not_gone_on_with(tracking):
    """MLflow's client makes a second one where the answer to its first request is late."""
    known = tracking.create("twice", {"seed": 0})
    tracking.client.create_run(tracking.experiment_id, run_name="twice")
    assert tracking.unfinished("twice") == tracking.find("twice") == known
    assert look_up(tracking.uri, "twice").info.run_id == known


def test_rows_that_are_told_written_are_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{tmp_path}/another.db")
    tracking = Tracking(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    run_id = tracking.create("now", {"seed": 0})
    record = RunRecord(tracking, run_id)
    record.log("train", 1, 1.0, {"loss": 1.0})
    assert record.flush() and rows(tracking, run_id, "loss") == [(1, 1.0)]
    record.close("FINISHED")
    register(tracking, "model", str(tmp_path), run_id, {}, [])
    assert [model.name for model in tracking.client.search_registered_models()] == ["model"]
    assert not (tmp_path / "another.db").exists()


def test_a_run_that_has_checkpoints_needs_its_origin_no_more(tracking, tmp_path):
    config = config_of(tmp_path, train={"init": f"{tmp_path}/gone"})
    config = replace(config, checkpoint=CheckpointConfig(url=str(tmp_path)), tracking=TrackingConfig(uri=tracking.uri))
    corpora = prepare(config.data)
    run_id = tracking.create(config.run.name, {"seed": 0})
    log = RunLog(run_store(config, run_id))
    log.take_over(identity(config, corpora))
    for resume in ("never", "auto", run_id):
        with pytest.raises(ConfigError, match="train.init=.*gone: no committed checkpoint"):
            find_run(config, corpora, resume)
    shard = write_shard(log.store, place_of(0, 1, 1), 0, {TensorSlice(WEIGHT, "w", 0, 2): np.zeros(2, np.float32)})
    log.commit(Manifest(run_id, 1, 1, 0, 1, {}, {}, {"w": [2]}, (shard,)))
    for resume in ("auto", run_id):
        found = find_run(config, corpora, resume)
        assert (found.run_id, found.origin) == (run_id, None)


def test_steps_that_a_run_has_behind_it_are_told_with_the_way_on(tracking, tmp_path):
    config = config_of(tmp_path, train={"steps": 60}, run=RunInfo(name="further"))
    config = replace(config, checkpoint=CheckpointConfig(url=str(tmp_path)), tracking=TrackingConfig(uri=tracking.uri))
    corpora = prepare(config.data)
    run_id = tracking.create(config.run.name, {"seed": 0})
    log = RunLog(run_store(config, run_id))
    elsewhere = find_run(config, corpora, "auto")
    assert elsewhere.run_id is None and f"nothing of the unfinished one named further, {run_id}" in elsewhere.notice
    log.take_over(identity(config, corpora))
    assert find_run(config, corpora, "auto").notice == ""
    tensors = {TensorSlice(kind, "w", 0, 2): np.zeros(2, np.float32) for kind in (WEIGHT, "momentum")}
    shard = write_shard(log.store, place_of(169, 1, 1), 0, tensors)
    log.commit(Manifest(run_id, 1, 1, 169, 1, {}, {}, {"w": [2]}, (shard,)))

    def to(steps: int, resume: str) -> Found:
        return find_run(replace(config, train=replace(config.train, steps=steps)), corpora, resume)

    for resume in ("auto", run_id):
        with pytest.raises(ConfigError, match="has come to step 169, and train.steps=60 is before that"):
            to(60, resume)
        assert "no step is left" in to(169, resume).notice
        further = to(170, resume)
        assert (further.run_id, further.notice) == (run_id, "")
    tracking.client.set_terminated(run_id, "FINISHED")
    with pytest.raises(ConfigError, match="is finished, at step 169"):
        to(169, run_id)
    assert to(170, run_id).run_id == run_id
    begun = to(170, "auto")
    assert begun.run_id is None and f"--resume {run_id} train.steps=N" in begun.notice
    assert to(170, "never").notice == ""


def test_rows_wait_while_the_store_does_not_answer(tracking, monkeypatch):
    run_id = tracking.create("waiting", {})
    record = RunRecord(tracking, run_id)
    write = record.client.log_batch

    def refuse(*args, **kwargs):
        raise OSError("the store is away")

    with record._flushing:  # So that the writing thread does not come in between.
        monkeypatch.setattr(record.client, "log_batch", refuse)
        record.log("train", 1, 1.0, {"loss": 1.0})
    assert not record.flush() and record.failure == f"tracking.uri={tracking.uri}: the store is away"
    monkeypatch.setattr(record.client, "log_batch", write)
    record.close("FINISHED")
    assert rows(tracking, run_id, "loss") == [(1, 1.0)]


def test_a_store_that_stands_still_does_not_hold_the_driver(tracking, monkeypatch):
    run_id = tracking.create("slow", {})
    record = RunRecord(tracking, run_id)
    write, answered = record.client.log_batch, threading.Event()
    monkeypatch.setattr(record.client, "log_batch", lambda *args, **kwargs: answered.wait() and write(*args, **kwargs))
    record.log("train", 1, 1.0, {"loss": 1.0})
    record.hurry(0.1)
    assert rows(tracking, run_id, "loss") == [], "it went on without"
    answered.set()
    record.hurry(60)
    assert rows(tracking, run_id, "loss") == [(1, 1.0)]
    record.close("FINISHED")


def test_what_was_written_before_a_failure_is_not_sent_again(tracking, monkeypatch):
    run_id = tracking.create("torn", {})
    record = RunRecord(tracking, run_id)
    write, sent = record.client.log_batch, []

    def fail_once(run_id, metrics):
        sent.append({metric.step for metric in metrics})
        if len(sent) == 2:
            raise OSError("the store is away")
        write(run_id, metrics=metrics)

    with record._flushing:  # So that the writing thread does not come in between.
        monkeypatch.setattr(record.client, "log_batch", fail_once)
        for step in range(1, 4):
            record.log("train", step, 1.0, {"loss": 1.0, **{f"metric/{number}": 1.0 for number in range(600)}})
    record.hurry(60)
    record.close("FINISHED")
    assert sent == [{1}, {2}, {2}, {3}]
    assert [step for step, _ in rows(tracking, run_id, "loss")] == [1, 2, 3]


class Beginner:
    """A driver that makes its run."""

    def begin(self, uri: str) -> str:
        return Tracking(TrackingConfig(uri=uri)).create("x", {"seed": 0})


def test_drivers_that_begin_together_in_a_fresh_folder_all_have_their_run(tmp_path):
    drivers = [ProcessHandle(Beginner) for _ in range(3)]
    runs = [driver.call("begin", f"sqlite:///{tmp_path}/new/mlflow.db") for driver in drivers]
    assert len({run.result(120) for run in runs}) == 3
    for driver in drivers:
        driver.kill()


@pytest.mark.parametrize("folder", ["ha#sh", "a b&c=d", "é[x]+"])
def test_a_database_may_lie_in_a_folder_of_many_names(tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    config = absolute(RunConfig()).tracking
    check = lambda: reach_tracking(config.uri, config.experiment)  # noqa: E731
    check()
    tracking = Tracking(config)
    run_id = tracking.create("a", {"p": 1})
    tracking.keep(run_id, "a.txt", "text")
    check()
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert database_files(config.uri)[0] == str(Path("runs/mlflow.db").resolve()) and Path("runs/mlflow.db").exists()
    assert read_artifact(config.uri, run_id, "a.txt") == "text" and list(Path("runs/artifacts").rglob("a.txt"))
    slow = replace(config, uri=f"{config.uri.replace(' ', '%20')}?timeout=7")
    assert database_files(slow.uri) == database_files(config.uri) and Tracking(slow).find("a") == run_id
    assert absolute(replace(RunConfig(), tracking=slow)).tracking.uri == f"{config.uri}?timeout=7"


@pytest.mark.parametrize("folder", ["wh?at", "per%cent"])
def test_a_database_that_mlflow_would_make_elsewhere_is_refused(tmp_path, monkeypatch, folder):
    """A question mark began the URL's options: the database was another file, outside of the folder."""
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    with pytest.raises(ConfigError, match=r"mlflow.db has a \? or a % in its name, .*; name another place"):
        absolute(RunConfig())


def test_a_locked_database_is_waited_for(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    Tracking(TrackingConfig(uri=uri))
    monkeypatch.setattr(mlflow_client, "LOCKED_S", 1)
    lock = sqlite3.connect(tmp_path / "mlflow.db", check_same_thread=False, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="database is locked; another process has held it for 1 s: end that one"):
        Tracking(TrackingConfig(uri=uri))
    monkeypatch.setattr(mlflow_client, "LOCKED_S", 60)
    unlock = threading.Timer(1.0, lock.execute, ["COMMIT"])
    unlock.start()
    assert Tracking(TrackingConfig(uri=uri)).create("x", {"seed": 0})
    unlock.join()
    lock.close()


@pytest.mark.parametrize("then", ["put back", "another", "gone"])
def test_a_database_that_is_removed_is_told_in_one_line_and_nothing_takes_its_place(tmp_path, capfd, then):
    file, aside = tmp_path / "mlflow.db", tmp_path / "aside.db"
    tracking = Tracking(TrackingConfig(uri=f"sqlite:///{file}"))
    run_id = tracking.create("removed", {"seed": 0})
    record = RunRecord(tracking, run_id)
    record.log("train", 1, 1.0, {"loss": 3.0})
    assert record.flush()
    file.rename(aside)
    if then == "another":
        file.write_bytes(aside.read_bytes())
    capfd.readouterr()
    for step in (2, 3):
        record.log("train", step, 1.0, {"loss": 1.0})
        assert not record.flush()
    record.tag_later("x", "y")
    what = "is another file now" if then == "another" else "is gone"
    assert f"the database {what}; put it back and the rows that wait are written" in record.failure
    with pytest.raises(StorageError, match=f"the database {what}"):
        record.history("loss")
    assert file.exists() is (then == "another") and capfd.readouterr() == ("", "")
    if then == "put back":
        aside.rename(file)
        record.close("FINISHED")
        assert rows(tracking, run_id, "loss") == [(1, 3.0), (2, 1.0), (3, 1.0)]
    else:
        with pytest.raises(
            StorageError, match=rf"2 rows could not be written to the MLflow run: .*the database {what}"
        ):
            record.close("FINISHED")
