"""`raymuon study spectrum` as a person runs it, with tasks on a cluster and an MLflow."""

import csv
import json
import subprocess

import numpy as np
import pytest

from orchestrator.config import TrackingConfig
from orchestrator.record.tracking import Tracking
from tests.e2e.conftest import RAYMUON, Place
from tests.jobs.test_export import trained
from tests.jobs.test_spectrum import entropy_of
from workers.models.language_model import MATRICES


@pytest.fixture
def place(tmp_path, cluster, warm):
    return Place(tmp_path, cluster, warm)


def test_two_runs_are_compared_and_logged(place):
    """Table, JSON and CSV agree with one another; the CSV with the tensors that the checkpoints were made of."""
    uri = f"sqlite:///{place.folder}/mlflow.db"
    tracking, ids = Tracking(TrackingConfig(uri=uri)), {}
    weights = {}
    for name, scale in (("one", 1.0), ("two", 3.0)):

        def stretch(model, scale=scale) -> None:
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.data[..., 0, :] *= scale

        run_id = ids[name] = tracking.create(name, {"seed": 0})
        folder = place.folder / "runs" / run_id
        model = trained(folder, "moonlight", steps=(10, 20), change=stretch, run_id=run_id)
        weights[name] = {key: value.detach().double().numpy() for key, value in model.named_parameters()}
        tracking.tag(run_id, {"raymuon.checkpoint_url": str(folder)})

    arguments = ("one", "two", "--series", "--out", "out", "--log", "--tracking-uri", uri, "--address", place.address)
    command = [RAYMUON, "study", "spectrum", *arguments, "--json"]
    done = subprocess.run(command, cwd=place.folder, env=place.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert [run["run"] for run in told["runs"]] == ["one", "two"] and told["logged"] == list(ids.values())
    assert [[one["step"] for one in run["checkpoints"]] for run in told["runs"]] == [[10, 20], [10, 20]]
    out = place.folder / "out"
    assert sorted(file.name for file in out.iterdir()) == sorted(told["files"])
    with (out / "matrices.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        matrix = weights[row["run"]][row["parameter"]]
        matrix = matrix[int(row["expert"])] if row["expert"] else matrix
        values = np.linalg.svd(matrix, compute_uv=False)
        assert float(row["entropy"]) == pytest.approx(entropy_of(values), abs=1e-9)
    for run in told["runs"]:
        for one in run["checkpoints"]:
            for group, mean in one["groups"].items():
                own = [
                    float(row["entropy"])
                    for row in rows
                    if (row["run"], row["step"], row["group"]) == (run["run"], str(one["step"]), group)
                ]
                assert mean["matrices"] == len(own) and mean["entropy"] == pytest.approx(sum(own) / len(own))
    (difference,) = told["differences"]
    assert difference["groups"].keys() == set(MATRICES)
    first, second = (run["checkpoints"][-1]["groups"] for run in told["runs"])
    for group, one in difference["groups"].items():
        entropies = first[group]["entropy"], second[group]["entropy"]
        assert one["entropy"] == pytest.approx(entropies[0] - entropies[1]) and one["entropy"] > 0, "rows stretched"
        assert f"{entropies[0]:.4f}" in done.stderr and f"{one['entropy']:+.4f}" in done.stderr
        assert f"{one['higher']} of {one['pairs']}" in done.stderr
    for run_id in ids.values():
        logged = tracking.client.list_artifacts(run_id, "spectra/step-00000020")
        assert sorted(file.path.rsplit("/", 1)[-1] for file in logged) == sorted(told["files"])
