"""Evaluation of a real run's checkpoints, by tasks of Ray's, into its record."""

import json
import subprocess
from pathlib import Path

import mlflow
import pytest

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
    asked = (run_id, "--tasks", "mine,stdlib_brackets", "--task-folder", "tasks", "--json")
    told = evaluate(place, *asked, "--series")
    found = json.loads(told.stdout.splitlines()[-1])
    steps = [20, 40, 60, 80, 100, 120]
    assert found["run_id"] == run_id and [one["step"] for one in found["checkpoints"]] == steps
    figures = {
        (one["step"], f["task"], f["metric"]): f["value"] for one in found["checkpoints"] for f in one["figures"]
    }
    for task, metric in (("mine", "acc"), ("stdlib_brackets", "exact_match")):
        assert history(client, run_id, f"eval/{task}/{metric}") == {step: figures[step, task, metric] for step in steps}
    assert {name for name in client.get_run(run_id).data.metrics if name.startswith("eval/")} == {
        *("eval/mine/acc", "eval/mine/acc_stderr"),
        *("eval/stdlib_brackets/exact_match", "eval/stdlib_brackets/exact_match_stderr"),
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


def test_a_part_of_the_documents_and_a_folder_of_no_run_are_printed_alone(run, tmp_path):
    place, run_id, client = run
    told = evaluate(place, f"{run_id}@40", "--tasks", "stdlib_text", "--limit", "2", "--batch-tokens", "64")
    assert "not put on record" in told.stderr + told.stdout and "bits_per_byte" in told.stdout
    exported = str(tmp_path / "hf")
    source = str(place.folder / "runs" / "checkpoints" / run_id)
    subprocess.run(
        [RAYMUON, "export", source, "--to", exported, "--dtype", "float32"], check=True, env=place.environment()
    )
    told = evaluate(place, exported, "--tasks", "mine_word", "--task-folder", "tasks", "--json")
    found = json.loads(told.stdout)
    assert "belongs to no run in MLflow" in told.stderr and not found["recorded"]
    of_run = json.loads(evaluate(place, run_id, *("--tasks", "mine_word", "--task-folder", "tasks", "--json")).stdout)
    (one,), (other,) = (result["checkpoints"][0]["figures"] for result in (found, of_run))
    assert one["value"] == pytest.approx(other["value"], rel=1e-5)
    assert not [name for name in client.get_run(run_id).data.metrics if "stdlib_text" in name]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--tasks", "mine_worde", "--task-folder", "tasks", "--limit", "1"], 2, "did you mean mine_word"),
        (["--tasks", "far", "--task-folder", "far"], 5, "task far: its data cannot be reached"),
        (["--tasks", "mine", "--task-folder", "nowhere"], 2, "no such folder"),
    ],
)
def test_bad_input_is_one_message(run, arguments, code, told):
    place, run_id, client = run
    if not (place.folder / "far").exists():
        write_tasks(
            place.folder / "far", far_yaml="task: far\ndataset_path: nobody/nothing\noutput_type: loglikelihood\n"
        )
    before = client.get_run(run_id).data.metrics
    done = evaluate(place, run_id, *arguments, code=code)
    assert told in done.stderr and done.stderr.count("raymuon: ") == 1 and not done.stdout.startswith("{")
    assert client.get_run(run_id).data.metrics == before
