"""What the version before has left goes on: its checkpoints, journal, MLflow record and prepared data.

`before.tar.xz` was made by commit 73298d3: a Moonlight of 7,000 parameters on the first 20,000 bytes of the tutorial,
60 steps by two workers of which one was killed at step 12, and what that commit then made of it: losses of ten more
steps, and the hash of the exported weights.
"""

import hashlib
import json
import sqlite3
import subprocess
import tarfile
from pathlib import Path

import pytest

from jobs.export import export
from tests.e2e.conftest import RAYMUON, Place


@pytest.fixture(scope="module")
def before(tmp_path_factory, cluster, warm):
    """A folder in which a person has trained with the version before, and what is expected."""
    folder = tmp_path_factory.mktemp("before")
    runs = folder / "runs"
    with tarfile.open(Path(__file__).with_name("before.tar.xz")) as archive:
        archive.extractall(runs, filter="data")
    for name in ("text.md", "config.yaml"):
        (runs / name).rename(folder / name)
    with sqlite3.connect(runs / "mlflow.db") as database:  # Artifacts go where this folder is.
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, '/tmp/fx/', ?)", (f"{folder}/",))
    return Place(folder, cluster, warm), json.loads((runs / "expected.json").read_text())


def told(place: Place, *arguments: str) -> dict:
    """Run a command in the folder, and return what it tells as JSON."""
    command = [RAYMUON, *arguments, "--json"]
    return json.loads(
        subprocess.check_output(
            command, cwd=place.folder, env=place.environment(), text=True, timeout=180
        ).splitlines()[-1]
    )


def test_a_run_of_the_version_before_is_replayed_and_goes_on(before):
    place, expected = before
    run = expected["run"]
    prepared = {path: path.stat().st_mtime_ns for path in (place.folder / "runs" / "data").rglob("*.bin")}
    assert prepared
    folder = f"runs/checkpoints/{run}"
    joined = ("data.source=text.md", "--address", place.address)
    replayed = told(place, "replay", folder, "--steps", "31:60", *joined)
    assert replayed["trained_from"] == 30 and replayed["verdict"] != "different" and replayed["compared"] == 62
    status = told(place, "status", run)
    assert (status["step"], status["status"]) == (60, "FINISHED")
    resumed = told(place, "train", "config.yaml", "--resume", run, "train.steps=70", *joined)
    assert resumed["steps"] == 70 and resumed["recoveries"] == 1 and resumed["changes"][0]["reason"] == "fault"
    losses = dict(place.history(run, "loss"))
    assert list(losses) == list(range(1, 71))
    later = {int(step): loss for step, loss in expected["losses"].items()}
    assert {step: losses[step] for step in later} == pytest.approx(later, rel=1e-3)
    assert prepared == {path: path.stat().st_mtime_ns for path in prepared}, "the prepared data are read, not remade"


def test_a_checkpoint_of_the_version_before_is_exported_as_it_was(before, tmp_path):
    place, expected = before
    export(f"{place.folder}/runs/checkpoints/{expected['run']}@60", str(tmp_path / "hf"), "bfloat16")
    digest = hashlib.sha256((tmp_path / "hf" / "model.safetensors").read_bytes()).hexdigest()
    assert digest == expected["exported_weights_sha256"]
