"""Bad input: one clear message, the right exit code, nothing left behind."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from jobs.bench.seaweed import KEY


def nothing_left(place) -> None:
    """No run in MLflow, no run's folder, no process."""
    assert not list((place.folder / "runs").glob("checkpoints/*")), "a half run"
    database = place.folder / "runs" / "mlflow.db"
    if database.exists():
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{database}")
        assert not client.search_runs([e.experiment_id for e in client.search_experiments()])
    for process in psutil.process_iter():
        try:
            assert process.cwd() != str(place.folder), f"{process} is left"
        except psutil.Error:
            continue


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["train.steps=many"], "train.steps: must be a whole number, not 'many'"),
        (["train.micro_batch=5"], "global_batch must be a multiple of micro_batch (5), not 12"),
        (["data.source=nowhere/*.txt"], "no file found"),
        (["train.seq_len=1000000"], "lower train.seq_len"),
        (["--resume", "nobody"], "no run of that id or name"),
        (["scaling.min_workers=3"], "max_workers must be at least min_workers (3), not 2"),
    ],
)
def test_config_errors(place, arguments, told):
    done = place.run(*arguments, code=2)
    assert told in done.stderr and done.stdout == ""
    nothing_left(place)


def test_an_empty_corpus(place):
    (place.folder / "empty").mkdir()
    (place.folder / "empty" / "blank.txt").write_text("\n")
    assert "no text" in place.run("data.source=empty", code=2).stderr
    nothing_left(place)


def test_more_workers_than_a_local_ray_can_hold(place):
    done = place.run("scaling.min_workers=64", "scaling.max_workers=64", code=3, address=None)
    assert "room for" in done.stderr and "scaling.min_workers" in done.stderr
    nothing_left(place)


def test_more_workers_than_the_cluster_gives(place):
    done = place.run("scaling.min_workers=64", "scaling.max_workers=64", "scaling.wait_s=3", code=3)
    assert "after 3 s the cluster has given 4 slot(s)" in done.stderr
    nothing_left(place)


def test_no_cluster_at_the_address(place):
    done = place.run(code=3, address="127.0.0.1:1")
    assert "no Ray cluster answers at '127.0.0.1:1'" in done.stderr
    nothing_left(place)


def test_an_unreachable_tracking_server(place):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        done = place.run(f"tracking.uri=http://127.0.0.1:{port}", code=5)
    assert "no server answers there" in done.stderr
    nothing_left(place)


def test_a_missing_bucket_and_a_wrong_key(place, s3_endpoint):
    options = ["checkpoint.url=s3://no-such-bucket/x", f"storage.s3_endpoint={s3_endpoint}"]
    done = place.run(*options, code=5)
    assert "s3://no-such-bucket/x" in done.stderr and "create the bucket" in done.stderr
    options[0] = "checkpoint.url=s3://raymuon/x"
    done = place.run(*options, code=5, env={"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert "s3://raymuon/x" in done.stderr and "check the keys" in done.stderr
    assert KEY not in done.stderr
    nothing_left(place)


def test_a_place_that_cannot_be_written(place):
    Path(place.folder / "file").write_text("")
    assert "file/checkpoints" in place.run("checkpoint.url=file/checkpoints", code=5).stderr
    nothing_left(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="not run: mounting a small disk needs root")
def test_a_full_disk_ends_the_run_and_keeps_what_was_committed(place):
    import subprocess

    small = place.folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"not run: {mounted.stderr.decode().strip()}")
    try:
        done = place.run("checkpoint.url=small/checkpoints", "checkpoint.every=5", code=5)
        assert "No space left" in done.stderr
        rows = place.checkpoints("ls", "small/checkpoints")
        assert rows and place.checkpoints("show", rows[-1]["url"])["step"] == rows[-1]["step"]
        assert place.checkpoints("diff", rows[-1]["url"], rows[-1]["url"])["bitwise_equal"], "the last one is whole"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_start_that_fails_does_not_tear_a_new_database(place):
    """The tables are made beside Ray's start; a refusal in the meantime must not leave half of them."""
    database = place.folder / "runs" / "mlflow.db"
    database.unlink()
    place.run("scaling.min_workers=64", "scaling.max_workers=64", "scaling.wait_s=0.1", code=3)
    assert database.exists()
    nothing_left(place)
