"""A run as a person starts it: on a local Ray, to the end."""

import json
import re
import uuid
from pathlib import Path

import mlflow
import pytest

from jobs.load import load
from jobs.planning.matrices import orthogonalization
from orchestrator.log.run_log import RunLog
from orchestrator.record.tracking import read_artifact
from tests.e2e.conftest import marked
from tests.warm import VARIABLE
from workers.common.storage import Store
from workers.models.language_model import KINDS

KEYS = {"run_id", "status", "steps", "tokens", "val_loss", "val_bits_per_byte", "world_size", "checkpoint"}
KEYS |= {"mlflow_tracking_uri", "wall_s", "first_step_s", "first_step_parts", "loss_curve", "sample"}


@pytest.fixture(scope="module")
def finished(make_place):
    place = make_place("finished")
    mark = uuid.uuid4().hex
    telemetry = ("telemetry.every=10", "telemetry.profile_step=5")
    done = place.run(
        *("train.steps=30", "checkpoint.every=10", "train.validate_every=10", *telemetry, "--json"),
        address=None,
        env={VARIABLE: "", "RAYMUON_TEST": mark},  # All of it as cold as for a person.
    )
    return place, done, marked(mark)


def test_the_last_line_is_one_json_object(finished):
    _, done, left = finished
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= KEYS and len(done.stdout.splitlines()) == 1
    assert (result["status"], result["steps"], result["world_size"]) == ("finished", 30, 2)
    assert result["tokens"] == 30 * 12 * 64
    assert result["val_loss"] < result["val_loss_start"] and result["sample"].startswith("def ")
    assert result["val_bits_per_byte"] == pytest.approx(result["val_loss"] / 0.6931471805599453)
    assert 0 < result["first_step_s"] < result["wall_s"]
    parts = result["first_step_parts"]
    assert sum(parts.values()) == pytest.approx(result["first_step_s"], abs=0.02)
    # A part that nobody ends would be taken for one of the next.
    assert min(seconds for part, seconds in parts.items() if part != "slots") > 0
    assert Path(result["loss_curve"]).read_bytes().startswith(b"\x89PNG")
    assert not {"raylet", "gcs_server"} & {*left}, "the local Ray is left"


def test_the_person_sees_how_it_went(finished):
    _, done, _ = finished
    for expected in (
        "step 0: validation loss",
        "validation at the end",
        "checkpoint:",
        "mlflow ui --backend-store-uri",
    ):
        assert expected in done.stderr
    assert "tokens/s" in done.stderr and "s left" in done.stderr


def test_mlflow_has_every_step_the_params_and_the_artifacts(finished):
    place, done, _ = finished
    result = json.loads(done.stdout.splitlines()[-1])
    client = mlflow.MlflowClient(result["mlflow_tracking_uri"])
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED" and run.data.params["optim.name"] == "muon"
    for metric in ("loss", "lr", "grad_norm", "tokens_per_second", "world_size"):
        assert [step for step, _ in place.history(result["run_id"], metric)] == list(range(1, 31)), metric
    assert [step for step, _ in place.history(result["run_id"], "val_loss")] == [0, 10, 20, 30]
    names = {artifact.path for artifact in client.list_artifacts(result["run_id"])}
    assert names == {"config.yaml", "events.json", "loss.png", "plan.json", "profile", "recovery.md"}
    assert [artifact.path for artifact in client.list_artifacts(result["run_id"], "profile")] == [
        "profile/step-5.json.gz"
    ]
    plan = json.loads(read_artifact(result["mlflow_tracking_uri"], result["run_id"], "plan.json"))
    expected = orthogonalization(load(str(place.folder / "tiny.yaml"), []), 2).as_dict()
    in_bytes = {"bytes_each_way", "worst_share_of_all_gather"}  # Twice as many on a CPU, which has fp32 on its wires.
    assert plan.keys() == expected.keys()
    assert {key: plan[key] for key in plan.keys() - in_bytes} == {key: expected[key] for key in plan.keys() - in_bytes}


def test_telemetry_reaches_mlflow_under_the_documented_names(finished):
    place, done, _ = finished
    result = json.loads(done.stdout.splitlines()[-1])
    logged = mlflow.MlflowClient(result["mlflow_tracking_uri"]).get_run(result["run_id"]).data.metrics
    documented = re.findall(r"^\| `([^`]+)`", Path("docs/telemetry.md").read_text(), re.MULTILINE)
    names = {name.replace("<group>", kind) for name in documented for kind in KINDS}
    spectra = {f"telemetry/svd_entropy/{kind}" for kind in KINDS}
    of_nodes = {"system/<node>/" + name.split("/")[2] for name in logged if name.startswith("system/")}
    of_run = {name for name in logged if not name.startswith("system/")}
    assert names - spectra <= of_run | of_nodes <= names
    for metric in ("mfu", "seconds/optimizer", "svd_entropy/experts", "attention/max_logit", "update_rms/router"):
        assert [step for step, _ in place.history(result["run_id"], metric)] == [10, 20, 30], metric


def test_checkpoints_are_committed_in_order(finished):
    place, done, _ = finished
    result = json.loads(done.stdout.splitlines()[-1])
    log = RunLog(Store(result["checkpoint"].rpartition("@")[0]))
    assert [entry.step for entry in log.commits] == [10, 20, 30] and log.attempt == 1
    shown = place.checkpoints("show", result["checkpoint"])
    counters = {"step": 30, "tokens": result["tokens"], "applied_steps": 30, "skipped": 0, "skipped_in_a_row": 0}
    assert shown["counters"] == counters
    kinds = {tensor["kind"] for tensor in shown["tensors"]}
    assert kinds == {"weight", "momentum_buffer", "exp_avg", "exp_avg_sq", "buffer"}
    difference = place.checkpoints("diff", f"{log.store.url}@20", f"{log.store.url}@30")
    assert not difference["bitwise_equal"] and difference["max_abs"] > 0


def test_adamw_trains_everything_under_the_same_engine(make_place):
    place = make_place("adamw")
    result = place.train("optim.name=adamw", "optim.lr=3e-3", "train.steps=20")
    assert result["val_loss"] < result["val_loss_start"]
    shown = place.checkpoints("show", result["checkpoint"])
    assert {tensor["kind"] for tensor in shown["tensors"]} == {"weight", "exp_avg", "exp_avg_sq", "buffer"}
