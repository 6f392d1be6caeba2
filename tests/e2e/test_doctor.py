"""The doctor's round on a real cluster, real stores and a real database: what it tells, and what it leaves."""

import json
import shutil
import signal
import subprocess

import mlflow
import pytest
import s3fs
from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD
from ray._raylet import GcsClient

from jobs.doctor.node_probe import NodeProbe
from jobs.doctor.tracking_probe import look_at_tracking
from jobs.stack.seaweed import client, s3_environment
from orchestrator.config import TrackingConfig
from tests.e2e.conftest import RAYMUON
from tests.servers import rclone

CLUSTER_CHECKS = ["nodes", "versions", "memory", "clock", "dashboard", "token", "matrix products", "collectives"]


@pytest.fixture
def dead_dashboard(cluster):
    """What a head goes on to announce when its dashboard has died; this one was started without."""
    head, key, of = GcsClient(address=cluster), b"webui:url", KV_NAMESPACE_DASHBOARD
    known = head.internal_kv_get(key, of)
    head.internal_kv_put(key, b"127.0.0.1:1", True, of)
    yield
    if known is None:
        head.internal_kv_del(key, False, of)
    else:
        head.internal_kv_put(key, known, True, of)


def start(place, *arguments):
    command = [RAYMUON, "doctor", "tiny.yaml", *arguments, "--address", place.address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=place.folder, env=place.environment(), **pipes)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def objects(endpoint, word):
    return [path for path in client(endpoint).find("raymuon") if word in path]


def test_a_round_in_which_the_dashboard_and_the_tracking_server_are_missing(
    place, s3_endpoint, tmp_path, dead_dashboard
):
    options = ["checkpoint.url=s3://raymuon/doctor", "data.prepared_url=s3://raymuon/doctor-data"]
    options += [f"storage.s3_endpoint={s3_endpoint}", "tracking.uri=http://127.0.0.1:1"]
    before = files(place.folder)
    calibration = tmp_path / "calibration.json"
    process = start(place, *options, "--json", "--calibration", str(calibration))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3 and "Traceback" not in err, err
    told = json.loads(out.splitlines()[-1])
    findings = told["findings"]
    assert list(dict.fromkeys(one["check"] for one in findings)) == [*CLUSTER_CHECKS, "storage", "data", "tracking"]
    dashboard, tracking = [one for one in findings if one["status"] == "failure"]
    assert dashboard["check"] == "dashboard" and "no Ray dashboard answers there" in dashboard["seen"]
    assert told["exit_code"] == 3 and tracking["check"] == "tracking" and "no server answers there" in tracking["seen"]
    seen = {one["check"]: one["seen"] for one in reversed(findings)}
    assert "2 slot(s) of a CPU" in seen["matrix products"] and "over 2 slot(s) with gloo" in seen["collectives"]
    assert "4 slot(s)" in seen["nodes"] and "alike on the driver and all nodes" in seen["versions"]
    assert "2 failure(s)" in err, "the table is for people"
    assert files(place.folder) == before and objects(s3_endpoint, "doctor") == [], "nothing is left"
    command = [RAYMUON, "plan", "tiny.yaml", "--gpus", "2", "--calibration", str(calibration), "--json"]
    plan = json.loads(subprocess.check_output(command, cwd=place.folder, env=place.environment(), text=True))
    assert plan["fits"] and plan["tokens_per_second"] > 0 and plan["bytes_sent"]["boundary"] > 0


def test_ctrl_c_ends_it_and_leaves_nothing(place, s3_endpoint):
    process = start(place, "checkpoint.url=s3://raymuon/stopped", f"storage.s3_endpoint={s3_endpoint}")
    for line in process.stderr:
        if line.startswith("using s3://raymuon/stopped"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "nothing is left behind" in err and "Traceback" not in err
    assert objects(s3_endpoint, "stopped") == []


def test_stores_that_are_lacking(tmp_path, s3_endpoint, monkeypatch):
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    probe = NodeProbe(s3_endpoint)
    assert "create the bucket" in probe.use("s3://no-such-bucket/x", ".doctor", "a").error
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    assert "check the keys" in probe.use("s3://raymuon/x", ".doctor", "a").error
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_environment()["AWS_SECRET_ACCESS_KEY"])
    s3fs.S3FileSystem.clear_instance_cache()
    (tmp_path / "store").mkdir()
    with rclone(tmp_path / "store") as endpoint:
        probe = NodeProbe(endpoint)
        seen = probe.use("s3://raymuon/x", ".doctor", "a")
        probe.tidy(["s3://raymuon/x"], ".doctor")
        assert seen.error == "" and not seen.fences, "it ignores If-None-Match"
        assert objects(endpoint, "doctor") == []


def test_a_database_is_used_and_left_as_it_was(tmp_path, database):
    shutil.copy(database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    seen = look_at_tracking(TrackingConfig(uri=uri, experiment="new"))
    assert (seen.error, seen.left, seen.note) == ("", "", "")
    tracking = mlflow.MlflowClient(uri)
    assert [one.name for one in tracking.search_experiments()] == ["Default"], "a run may still make its own"
    seen = look_at_tracking(TrackingConfig(uri=uri, experiment="Default"))
    assert (seen.error, seen.left) == ("", "") and not tracking.search_runs(["0"])
    assert files(tmp_path) == files(database.parent) == ["mlflow.db"], "where the artifacts of `Default` go, too"
