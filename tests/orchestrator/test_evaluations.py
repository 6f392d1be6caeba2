"""The evaluations of a run in a real MLflow database, beside its own record."""

import json
from pathlib import Path

import mlflow
import pytest

from orchestrator.config import TrackingConfig
from orchestrator.record.evaluations import EvaluationRecord, metric_name
from orchestrator.record.metrics import published
from orchestrator.record.tracking import RunRecord, Tracking, read_artifact
from workers.common.errors import StorageError


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """A database: making its tables takes seconds."""
    return Tracking(TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"))


@pytest.fixture
def run(tracking):
    """A finished run with twenty steps on record."""
    record = RunRecord(tracking, tracking.create("run", {"p": 1}))
    for step in range(20):
        record.log("train", step, 1000.0 + step, {"loss": 1.0 / (step + 1)})
    record.close("FINISHED")
    return tracking.uri, record.run_id, mlflow.MlflowClient(tracking.uri)


def history(client, run_id: str, name: str) -> list[tuple[int, float, int]]:
    return sorted((one.step, one.value, one.timestamp) for one in client.get_metric_history(run_id, name))


def test_figures_become_a_curve_at_the_steps_and_times_of_their_checkpoints(run):
    uri, run_id, client = run
    record = EvaluationRecord(uri, run_id)
    assert record.add(10, 1010.0, {"mmlu/acc": 0.3, "mmlu/acc_stderr": 0.01}) == {}
    assert record.add(5, 1005.0, {"mmlu/acc": 0.25}) == {}
    assert history(client, run_id, "eval/mmlu/acc") == [(5, 0.25, 1005_000), (10, 0.3, 1010_000)]
    assert published("eval/mmlu/acc") == "eval/mmlu/acc", "a driver would give it another name"


def test_a_step_stands_once_whoever_evaluates_it_again(run):
    uri, run_id, client = run
    EvaluationRecord(uri, run_id).add(10, 1010.0, {"a/acc": 0.3})
    again = EvaluationRecord(uri, run_id)
    assert again.add(10, 1010.0, {"a/acc": 0.3, "b/acc": 0.5}) == {"a/acc": 0.3}
    assert again.add(10, 1010.0, {"a/acc": 0.4}) == {"a/acc": 0.3}
    assert [row[:2] for row in history(client, run_id, "eval/a/acc")] == [(10, 0.3)]
    assert [row[:2] for row in history(client, run_id, "eval/b/acc")] == [(10, 0.5)]


def test_the_runs_own_record_is_not_disturbed(run, tracking):
    uri, run_id, client = run
    before, loss = client.get_run(run_id), history(client, run_id, "loss/train")
    record = EvaluationRecord(uri, run_id)
    record.add(19, 1.0, {"a/acc": 0.3})
    record.write_table()
    after = client.get_run(run_id)
    assert (after.info.status, after.info.end_time) == (before.info.status, before.info.end_time)
    assert history(client, run_id, "loss/train") == loss
    led = RunRecord(tracking, run_id)  # As a driver that goes on with the run.
    assert led.marks == {"train": 19, "validation": -1}
    led.abandon()


def test_the_table_has_all_that_is_on_record(run, monkeypatch):
    uri, run_id, client = run
    record = EvaluationRecord(uri, run_id)
    record.add(10, 1010.0, {"a/acc": 0.3, "a/acc_stderr": 0.01, "b/exact_match.strict": 0.5})
    record.add(20, 1020.0, {"a/acc": 0.4})
    record.write_table()
    record.write_table()
    assert json.loads(read_artifact(uri, run_id, "evaluation/table.json")) == {
        "columns": ["step", "task", "metric", "value", "standard error"],
        "data": [[10, "a", "acc", 0.3, 0.01], [10, "b", "exact_match.strict", 0.5, None], [20, "a", "acc", 0.4, None]],
    }
    shown = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "evaluation/table.json", "type": "table"}]
    experiment = client.get_run(run_id).info.experiment_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # It looks there, whatever the client's is.
    assert len(client.load_table(experiment, "evaluation/table.json", run_ids=[run_id])) == 3


def test_details_are_kept_once(run, tmp_path):
    uri, run_id, client = run
    record = EvaluationRecord(uri, run_id)
    for value in (1, 2):
        record.keep("mine: a/b", 10, {"value": value})
    (file,) = client.list_artifacts(run_id, "evaluation/mine_ a_b")
    assert file.path.endswith("step-00000010.json")
    assert json.loads(Path(client.download_artifacts(run_id, file.path, str(tmp_path))).read_text()) == {"value": 1}


def test_names_are_those_that_mlflow_takes(run):
    assert metric_name("group::task,x/acc,none") == "eval/group__task_x/acc_none"
    uri, run_id, _ = run
    EvaluationRecord(uri, run_id).add(1, 1.0, {"group::täsk (x)/acc,none": 1.0})


def test_a_run_that_is_not_there_is_told(run):
    uri, _, _ = run
    with pytest.raises(StorageError):
        EvaluationRecord(uri, "0" * 32).add(1, 1.0, {"a/acc": 1.0})
