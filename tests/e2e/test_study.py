"""`raymuon study run` through Ray: killed in the middle, a worker of it before that, and gone on with."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from jobs.study.record import outcomes
from orchestrator.record.metrics import published, read_history
from tests.e2e.conftest import RAYMUON, Place, marked
from tests.e2e.test_resume import workers_of

STEPS = 150
STUDY = {
    "name": "rates",
    "base": "tiny.yaml",
    "settings": {
        "scaling.min_workers": 1,
        "train.steps": STEPS,
        "train.validate_every": 30,
        "train.sample_prompt": "",
        "checkpoint.every": 10,
        "checkpoint.keep_last": 2,
        "data.ledger": "ledger",
    },
    "axes": {"optim.lr": [1e-2, 2e-2, 3e-2]},
    "question": {"name": "ablation"},
}


def start(place: Place, *arguments: str, **environment: str) -> subprocess.Popen:
    (place.folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    command = [RAYMUON, "study", "run", "study.yaml", "--at-once", "2", "--address", place.address, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=place.folder, env=place.environment(**environment), **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err + out
    return out, err


class Store:
    """What a study has put into MLflow."""

    def __init__(self, place: Place) -> None:
        self.client = MlflowClient(f"sqlite:///{place.folder}/runs/mlflow.db")

    def runs(self) -> list:
        experiments = [one.experiment_id for one in self.client.search_experiments()]
        return self.client.search_runs(experiments)

    @property
    def parent(self) -> str:
        (found,) = [run.info.run_id for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]
        return found

    def steps(self) -> dict[str, list[int]]:
        """Steps on record by the name of the run."""
        children = [run for run in self.runs() if "mlflow.parentRunId" in run.data.tags]
        names = [run.info.run_name for run in children]
        assert len({*names}) == len(names), "a trial has one run"
        history = {run.info.run_name: read_history(self.client, run.info.run_id, "loss") for run in children}
        return {name: [one.step for one in rows] for name, rows in history.items()}

    def reached(self, step: int, trials: int, process: subprocess.Popen) -> None:
        """Wait until so many trials have come to a step."""
        while sum(max(steps, default=0) >= step for steps in self.steps().values()) < trials:
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)

    def recovered(self, process: subprocess.Popen) -> None:
        """Wait until a trial has survived a fault."""
        while not any(published("recovery_seconds") in run.data.metrics for run in self.runs()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)

    def figures(self) -> dict:
        found = outcomes(self.client, self.parent)
        assert all(one.status == "finished" for one in found.values())
        return {name: (one.losses, one.validation, one.val_loss) for name, one in found.items()}


@pytest.fixture(scope="module")
def unbroken(make_place):
    place = make_place("study")
    out, _ = finish(start(place, "--json"))
    return place, json.loads(out.splitlines()[-1])


def test_a_study_trains_all_its_trials_and_leaves_a_report(unbroken):
    place, told = unbroken
    store = Store(place)
    assert told["run_id"] == store.parent and len(told["trials"]) == 3
    assert store.steps() == {f"rates/{name}": [*range(1, STEPS + 1)] for name in told["trials"]}
    assert all(one["val_loss"] < 5 and one["status"] == "finished" for one in told["trials"].values())
    assert Path(told["report"]).is_relative_to(place.folder)
    kept = {artifact.path for artifact in store.client.list_artifacts(store.parent, "report")}
    assert kept == {f"report/{path.name}" for path in Path(told["report"]).iterdir()} and "report/report.html" in kept
    assert store.client.get_run(store.parent).info.status == "FINISHED"


def test_a_report_is_made_again_from_mlflow_alone(unbroken):
    place, told = unbroken
    (place.folder / "study.yaml").unlink()
    command = [RAYMUON, "study", "report", "rates", "--out", "again", "--json"]
    again = json.loads(subprocess.check_output(command, cwd=place.folder, env=place.environment(), text=True))
    assert {**again, "report": ""} == {**told, "report": ""}
    for file in Path(told["report"]).iterdir():
        assert (place.folder / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_study_that_is_killed_loses_no_trial_and_repeats_none(unbroken, place):
    """SIGKILL of a worker, which its trial survives, and then of the whole study."""
    store, first = Store(place), start(place, RAYMUON_TEST="killed-study")
    store.reached(12, 2, first)
    workers = workers_of(place)
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    store.recovered(first)
    os.killpg(first.pid, signal.SIGKILL)
    _, err = first.communicate(timeout=30)
    assert "training again after" in err, "the worker's death was survived"
    psutil.wait_procs(workers, timeout=30)
    reached = store.steps()
    assert any(0 < len(steps) < STEPS for steps in reached.values()), "in the middle"

    _, err = finish(start(place))
    assert "goes on behind step" in err
    assert store.steps() == {name: [*range(1, STEPS + 1)] for name in Store(unbroken[0]).steps()}
    assert store.figures() == Store(unbroken[0]).figures(), "bit by bit"
    assert not marked("killed-study")


def test_one_process_runs_it_and_ctrl_c_saves_and_says_how_to_go_on(place):
    endless = "train.steps=100000"  # A second process waits for the lease of what may have been killed.
    store, process = Store(place), start(place, endless)
    store.reached(8, 1, process)
    _, err = finish(start(place, endless), code=3)
    assert "study rates: process" in err and "runs it; wait for it, or end that one first" in err
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    assert "stopped with 0 trial(s) done and 3 left; go on with:" in err and "study run study.yaml" in err
    status = [RAYMUON, "study", "status", "study.yaml", "--json"]
    told = json.loads(subprocess.check_output(status, cwd=place.folder, env=place.environment(), text=True))
    assert (told["finished"], told["left"], told["running"]) == (0, 3, 0)
    assert store.client.get_run(store.parent).info.status == "KILLED"
