"""Evaluation of a real run's checkpoints, by tasks of Ray's, into its record."""

import json
import subprocess
from pathlib import Path

import mlflow
import pytest

from jobs.export import export
from tests.e2e.conftest import RAYMUON
from tests.jobs.task_files import write_tasks


def evaluate(place, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """Run the command as in a shell that has nothing set for lm-eval's libraries."""
    ours = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "DISABLE_MULTIPROC")
    environment = {name: value for name, value in place.environment().items() if name not in ours}
    command = [RAYMUON, "evaluate", *arguments, "--address", place.address]
    done = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run(uninterrupted):
    """A run with a checkpoint each twenty steps, and a task folder beside it."""
    place, result = uninterrupted
    write_tasks(place.folder / "tasks")
    return place, result["run_id"], mlflow.MlflowClient(f"sqlite:///{place.folder}/runs/mlflow.db")


def history(client, run_id: str, name: str) -> dict[int, float]:
    found = client.get_metric_history(run_id, name)
    assert len({one.step for one in found}) == len(found), f"{name}: a step stands twice"
    return {one.step: one.value for one in found}


def test_a_series_becomes_a_curve_in_the_runs_record(run, tmp_path):
    place, run_id, client = run
    before, loss = client.get_run(run_id).info, place.history(run_id, "loss")
    asked = (run_id, "--tasks", "mine,stdlib_continuation", "--task-folder", "tasks", "--json")
    told = evaluate(place, *asked, "--series")
    found = json.loads(told.stdout.splitlines()[-1])
    steps = [20, 40, 60, 80, 100, 120]
    assert found["run_id"] == run_id and [one["step"] for one in found["checkpoints"]] == steps
    figures = {
        (one["step"], f["task"], f["metric"]): f["value"] for one in found["checkpoints"] for f in one["figures"]
    }
    for task, metric in (("mine", "acc"), ("stdlib_continuation", "acc_norm")):
        assert history(client, run_id, f"eval/{task}/{metric}") == {step: figures[step, task, metric] for step in steps}
    assert {name for name in client.get_run(run_id).data.metrics if name.startswith("eval/")} == {
        *("eval/mine/acc", "eval/mine/acc_stderr"),
        *(f"eval/stdlib_continuation/acc{norm}{stderr}" for norm in ("", "_norm") for stderr in ("", "_stderr")),
    }
    table = json.loads(Path(client.download_artifacts(run_id, "evaluation/table.json", str(tmp_path))).read_text())
    assert [row[0] for row in table["data"] if row[1:3] == ["mine", "acc"]] == steps
    details = client.list_artifacts(run_id, "evaluation/mine")
    assert [one.path.rsplit("-")[-1] for one in details] == [f"{step:08d}.json" for step in steps]

    again = evaluate(place, *asked)
    assert json.loads(again.stdout.splitlines()[-1])["checkpoints"] == found["checkpoints"][-1:]
    assert "on record" not in again.stderr and len(history(client, run_id, "eval/mine/acc")) == 6
    after = client.get_run(run_id).info
    assert (after.status, after.end_time) == (before.status, before.end_time) and place.history(run_id, "loss") == loss


def test_a_folder_of_no_run_comes_to_the_same_and_is_printed_alone(run, tmp_path):
    place, run_id, client = run
    export(str(place.folder / "runs" / "checkpoints" / f"{run_id}@20"), str(tmp_path / "hf"), "float32")
    before = client.get_run(run_id).data.metrics
    told = evaluate(place, str(tmp_path / "hf"), "--tasks", "mine_word", "--task-folder", "tasks", "--json")
    found = json.loads(told.stdout)
    assert "belongs to no run in MLflow" in told.stderr and not found["recorded"]
    ((figure,),) = (one["figures"] for one in found["checkpoints"])
    details = client.download_artifacts(run_id, "evaluation/mine/step-00000020.json", str(tmp_path))
    of_run = json.loads(Path(details).read_text())["results"]["mine_word"]
    assert figure["value"] == pytest.approx(of_run["perplexity,none"], rel=1e-5)
    assert client.get_run(run_id).data.metrics == before
