"""Bad input: one clear message, the right exit code, nothing left behind."""

import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from jobs.stack.seaweed import KEY


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
        (["train.init=nowhere/run", "data.source=nowhere/*.txt"], "train.init="),
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


@pytest.fixture
def small_disk(place):
    """A disk of 1.5 MB at `small/`: room for a few checkpoints."""
    small = place.folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"not run, mounting needs root: {mounted.stderr.decode().strip()}")
    yield small
    subprocess.run(["umount", "--lazy", str(small)], check=True)


@pytest.mark.parametrize(("harm", "told"), [("full", "No space left"), ("read-only", "Read-only file system")])
def test_a_disk_that_ends_to_take_checkpoints_ends_the_run_and_keeps_the_last(place, small_disk, harm, told):
    options = ["checkpoint.url=small/checkpoints", "checkpoint.every=5", "recovery.max_failed_saves=0"]
    running = place.start(*options, "train.steps=100000", "checkpoint.keep_last=0")
    if harm == "read-only":
        while not (small_disk / "checkpoints").is_dir() or not place.checkpoints("ls", "small/checkpoints"):
            assert running.poll() is None
            time.sleep(0.1)
        while subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True).returncode:
            assert running.poll() is None  # Busy as long as a file is being written.
    _, err = running.communicate(timeout=180)
    assert running.returncode == 5 and told in err and "Traceback" not in err
    assert "recovery.max_failed_saves=0" in err
    rows = place.checkpoints("ls", "small/checkpoints")
    assert rows and place.checkpoints("verify", rows[-1]["url"])["damaged"] == [], "the last one is whole"
    # And it is told at once where nothing can be written from the beginning.
    done = place.run(*options, code=5)
    assert told in done.stderr
    assert place.checkpoints("ls", "small/checkpoints") == rows


def test_a_start_that_fails_does_not_tear_a_new_database(place):
    """The tables are made beside Ray's start; a refusal in the meantime must not leave half of them."""
    database = place.folder / "runs" / "mlflow.db"
    database.unlink()
    place.run("scaling.min_workers=64", "scaling.max_workers=64", "scaling.wait_s=0.1", code=3)
    assert database.exists()
    nothing_left(place)


def test_conversations_in_which_the_assistant_says_nothing(place):
    (place.folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    done = place.run("data.source=chat.jsonl", "data.format=chat", code=2)
    assert "chat.jsonl:1: field 'messages': no message is the assistant's" in done.stderr and done.stdout == ""
    nothing_left(place)
