"""A dense run, made a mixture of experts, and a run that begins with that: as a person does it."""

import json
import subprocess

import pytest

from tests.e2e.conftest import RAYMUON

ENDS = ("train.steps=20", "checkpoint.every=20", "train.validate_every=20", "train.sample_bytes=0")


def test_a_run_begins_with_what_a_dense_one_became(place, texts):
    done = place.train("model.num_dense_layers=2", *ENDS)
    typed = [RAYMUON, "convert", "upcycle", done["run_id"], "--to", "mixture", "--experts", "3", "--json"]
    said = subprocess.run(typed, cwd=place.folder, env=place.environment(), text=True, capture_output=True, check=True)
    keys = [f"model.{key}={value}" for key, value in json.loads(said.stdout)["model"].items()]
    trained = place.train("train.init=mixture", *keys, "optim.lr=3e-3", *ENDS)
    assert trained["val_loss_start"] == pytest.approx(done["val_loss"], abs=1e-5), "it begins where the other ended"
    assert trained["status"] == "finished" and trained["val_loss"] < trained["val_loss_start"]
    first, second = place.checkpoints("show", trained["checkpoint"])["lineage"]["ancestors"]
    assert (first["run_id"], first["step"]) == ("mixture", 0) and (second["run_id"], second["step"]) == (
        done["run_id"],
        20,
    )
