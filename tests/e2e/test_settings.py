"""A run with settings that a study has found: its record tells where they come from, also when it goes on."""

import json
import subprocess

import mlflow
import yaml

from jobs.settings import settings_yaml
from jobs.study.question import Answer, Setting, Study
from jobs.study.questions.ablation import Ablation
from orchestrator.record.tracking import read_artifact
from tests.e2e.conftest import RAYMUON


def test_the_record_of_a_run_tells_where_its_settings_come_from(place):
    found = {"optim.lr": Setting(value=0.0123, why=""), "optim.momentum": Setting(value=0.9, why="")}
    answer = Answer(headline="found", facts={}, settings=found)
    (place.folder / "found.yaml").write_text(settings_yaml(Study(name="rates", question=Ablation()), answer, "run-1"))
    done = place.run("--with", "found.yaml", "train.steps=4", "optim.momentum=0.8", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    (further,) = [line for line in done.stderr.splitlines() if "train it further" in line]
    assert "--with found.yaml" in further and f"--resume {result['run_id']}" in further
    uri, run_id = result["mlflow_tracking_uri"], result["run_id"]

    origin = "found.yaml of study rates, run run-1"
    run = mlflow.MlflowClient(uri).get_run(run_id)
    assert (run.data.params["optim.lr"], run.data.params["optim.momentum"]) == ("0.0123", "0.8")
    assert run.data.tags["raymuon.settings"] == f"optim.lr=0.0123 from {origin}; optim.momentum=0.8 from command line"
    kept = read_artifact(uri, run_id, "config.yaml")
    assert yaml.safe_load(kept)["from"] == {"optim.lr": origin, "optim.momentum": "command line"}
    status = [RAYMUON, "status", run_id, "--tracking-uri", uri, "--json"]
    told = subprocess.check_output(status, cwd=place.folder, env=place.environment(), text=True)
    assert json.loads(told)["settings"] == run.data.tags["raymuon.settings"]

    # As a job of a cluster does, which has no more than the config that was put down.
    (place.folder / "tiny.yaml").write_text(kept)
    (place.folder / "found.yaml").unlink()
    place.train("--resume", run_id, "train.steps=6", "optim.lr=0.01")
    tags = mlflow.MlflowClient(uri).get_run(run_id).data.tags
    assert tags["raymuon.settings"] == "optim.lr=0.01 from command line; optim.momentum=0.8 from command line"
