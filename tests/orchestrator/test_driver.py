"""A driver whose members are simulated in its process: what becomes of the record when something takes it away."""

import sqlite3
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace

import mlflow
import pytest

from jobs.bench.simulated import SimulatedCluster
from jobs.curves import plot_losses
from jobs.load import load
from orchestrator.config import RunConfig
from orchestrator.driver import Options, run_on
from orchestrator.log.run_log import FencedError, RunLog
from orchestrator.record.recorder import rate_jump
from orchestrator.record.result import RunResult
from orchestrator.record.tracking import Tracking
from orchestrator.record.watcher import Watcher
from orchestrator.stop import StopSignal
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.reports import Report, StepDone


def config_of(folder, steps: int) -> RunConfig:
    fixed = [
        *(f"train.steps={steps}", "train.validate_every=0", "train.sample_prompt=''", "checkpoint.every=10"),
        *("scaling.min_workers=2", "scaling.max_workers=2", f"data.source={__file__}", "train.global_batch=2"),
        *("train.micro_batch=1", "train.seq_len=64", "data.held_out_fraction=0.3", "train.validate_sequences=1"),
        *(f"data.prepared_url={folder}/data", f"checkpoint.url={folder}/runs"),
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
    ]
    return load("demo", fixed)


class At(Watcher):
    """Does something after a step."""

    def __init__(self, step: int, work) -> None:
        self.step, self.work, self.run_id, self.warnings = step, work, "", []

    def begin(self, run_id: str, *_: object) -> None:
        self.run_id = run_id

    def report(self, report: Report) -> None:
        if isinstance(report, StepDone) and report.step == self.step:
            self.work(self.run_id)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def drive(
    config: RunConfig,
    watcher: Watcher,
    resume: str = "never",
    stop: StopSignal | None = None,
    options: Options | None = None,
) -> RunResult:
    with SimulatedCluster(100.0, real_time=True) as cluster:
        return run_on(cluster, config, resume, watcher, stop or StopSignal(), options or Options())


def test_a_run_of_which_is_found_late_that_it_does_not_fit_is_refused_before_it_is_made(tmp_path):
    """It is looked at while Ray and the workers start."""
    config, looked = config_of(tmp_path, steps=60), Future()
    looked.set_exception(ConfigError("does not fit"))
    with pytest.raises(ConfigError, match="does not fit"):
        drive(config, At(0, lambda run_id: None), options=Options(looked=looked))
    client = Tracking(config.tracking).client
    (experiment,) = (one for one in client.search_experiments() if one.name == config.tracking.experiment)
    assert not client.search_runs([experiment.experiment_id])


def test_a_fenced_driver_leaves_the_record_to_its_successor(tmp_path):
    config = config_of(tmp_path, steps=1000)

    def take_over(run_id: str) -> None:
        log = RunLog(Store(f"{tmp_path}/runs/{run_id}"))
        log.take_over(log.identity)

    watcher = At(15, take_over)
    with pytest.raises(FencedError):
        drive(config, watcher)
    run = Tracking(config.tracking).client.get_run(watcher.run_id)
    assert run.info.status == "RUNNING" and "raymuon.error" not in run.data.tags
    assert "raymuon.goodput" not in run.data.tags
    artifacts = Tracking(config.tracking).client.list_artifacts(watcher.run_id)
    assert "recovery.md" not in {artifact.path for artifact in artifacts}


def test_a_record_that_mlflow_does_not_take_at_the_end_is_made_good_by_the_next_driver(tmp_path):
    config = config_of(tmp_path, steps=60)

    def rename(table: str, other: str) -> None:
        with closing(sqlite3.connect(tmp_path / "mlflow.db", timeout=60)) as database, database:
            database.execute(f"ALTER TABLE {table} RENAME TO {other}")

    watcher = At(40, lambda run_id: rename("metrics", "away"))
    with pytest.raises(StorageError) as refusal:
        drive(config, watcher)
    rename("away", "metrics")
    assert "the training is finished at step 60 and saved" in str(refusal.value)
    assert "its record in MLflow is not complete, its journal is" in str(refusal.value)
    client = mlflow.MlflowClient(config.tracking.uri)
    before = {metric.step for metric in client.get_metric_history(watcher.run_id, "loss/train")}
    assert len(before) < 60
    successor = At(0, lambda run_id: None)
    drive(config_of(tmp_path, steps=70), successor, resume=watcher.run_id)
    (jump,) = (text for text in successor.warnings if "learning rate" in text)
    assert jump.startswith("the learning rate jumps up: step 60 was trained with 0.0016 (0.10 of optim.lr)")
    history = client.get_metric_history(watcher.run_id, "loss/train")
    assert sorted(metric.step for metric in history) == list(range(1, 71))


def test_a_learning_rate_that_jumps_on_resume_is_told():
    config = load("demo", ["train.steps=200", "optim.lr=1e-2", "optim.warmup_steps=0"])
    at_its_end = config.optim.curve(200).at(200)
    assert rate_jump(config, 200, at_its_end) == ""
    longer = replace(config, train=replace(config.train, steps=400))
    jump = rate_jump(longer, 200, at_its_end)
    assert "jumps up: step 200 was trained with 0.001 (0.10 of optim.lr)" in jump and "0.0055 (0.55)" in jump
    assert "jumps down" in rate_jump(replace(config, optim=replace(config.optim, lr=1e-3)), 200, at_its_end)
    assert "jumps up" in rate_jump(longer, 200, 0.0)


def test_a_stop_before_the_first_step_leaves_a_run_that_can_be_begun(tmp_path):
    """It came after the run was made, and before anybody trained."""
    config = config_of(tmp_path, steps=60)
    stop = StopSignal(lambda run_id: f"go on with {run_id}")
    watcher = At(0, lambda run_id: None)
    watcher.page = lambda *_: stop.request()
    result = drive(config, watcher, stop=stop)
    assert (result.status, result.steps, result.checkpoint) == ("interrupted", 0, "")
    assert str(stop.interrupted("x")) == f"x; go on with {result.run_id}"
    client = Tracking(config.tracking).client
    assert client.get_run(result.run_id).info.status == "KILLED"
    plot_losses({"none yet": result.losses}, tmp_path / "loss.png")
    went_on = drive(config, At(0, lambda run_id: None), resume="auto")
    assert (went_on.run_id, went_on.status, went_on.steps) == (result.run_id, "finished", 60)
    assert client.get_run(result.run_id).info.status == "FINISHED"
