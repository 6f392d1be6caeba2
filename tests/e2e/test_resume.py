"""A run that was killed, stopped or moved to another world size goes on as if nothing had been."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from orchestrator.record.journal import Row, read_journal
from tests.e2e.conftest import Place
from tests.ledger import ledger
from workers.common.storage import Store

STEPS, EVERY = 120, 20


def wait_for_step(place: Place, step: int, attempt: int) -> None:
    """Wait until the run has begun a step, as its ledger tells."""
    for _ in range(60_000):
        if any(line["step"] >= step and line["attempt"] == attempt for line in _last_lines(place)):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} never came")


def _last_lines(place: Place) -> list[dict]:
    lines = [file.read_text().splitlines() for file in (place.folder / "ledger").glob("*.jsonl")]
    complete = [file_lines[-1] for file_lines in lines if file_lines]
    return [json.loads(line) for line in complete if line.endswith("}")]


def workers_of(place: Place) -> list[psutil.Process]:
    """Find the worker processes of a run: they hold its ledger open."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(Path(file.path).parent == place.folder / "ledger" for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("store", ["folder", "s3"])
def test_killed_and_started_again_is_bitwise_the_same(store, uninterrupted, place, request):
    reference, expected = uninterrupted
    options = ["data.ledger=ledger"]
    endpoint = []
    if store == "s3":
        url = request.getfixturevalue("s3_endpoint")
        options += [f"checkpoint.url=s3://raymuon/{place.folder.name}", f"storage.s3_endpoint={url}"]
        endpoint = ["--s3-endpoint", url]
    step = random.SystemRandom().randrange(EVERY + 1, STEPS - 40)
    print(f"killed at step {step}")
    driver = place.start(*options)
    for line in driver.stderr:  # Checkpoints are written beside training: the first one takes its time to count.
        if ": checkpoint" in line:
            break
    wait_for_step(place, step, attempt=1)
    victims = workers_of(place)
    assert len(victims) == 2
    # Once the driver alone: Ray then ends what was its own.
    for process in [psutil.Process(driver.pid), *(victims if store == "folder" else [])]:
        process.send_signal(signal.SIGKILL)
    driver.wait(30)
    psutil.wait_procs(victims, timeout=30)
    assert not any(process.is_running() for process in victims), "no orphan"
    assert driver.returncode == -signal.SIGKILL

    result = place.train("--resume", "auto", *options)
    assert result["status"] == "finished" and result["steps"] == STEPS and result["tokens"] == STEPS * 12 * 64
    second = [line["step"] for line in ledger(place.folder / "ledger") if line["attempt"] == 2]
    assert (min(second) - 1) % EVERY == 0 and min(second) > EVERY, "went on from a checkpoint"
    place.assert_every_sample_once()

    difference = place.checkpoints("diff", expected["checkpoint"], result["checkpoint"], *endpoint)
    assert difference["bitwise_equal"], difference["max_abs"]
    steps = [row_step for row_step, _ in place.history(result["run_id"], "loss")]
    assert steps == list(range(1, STEPS + 1)), "the MLflow run holds each step once"
    assert place.history(result["run_id"], "loss") == reference.history(expected["run_id"], "loss")
    assert place.history(result["run_id"], "val_loss") == reference.history(expected["run_id"], "val_loss")
    if store == "folder":
        journal = read_journal(Store(result["checkpoint"].rpartition("@")[0]), pytest.fail)
        told = {line.step for line in journal if isinstance(line, Row) and line.series == "train"}
        assert told == set(range(1, STEPS + 1)), "so does the journal, though one driver never put its last steps down"
    listed = place.checkpoints("ls", result["checkpoint"].rpartition("@")[0], *endpoint)
    assert [row["step"] for row in listed][-1] == STEPS and {row["attempt"] for row in listed} == {1, 2}


def test_saved_at_two_workers_goes_on_at_one_and_three(uninterrupted, make_place):
    reference, expected = uninterrupted
    at_two = dict(reference.history(expected["run_id"], "loss"))  # The learning rate is constant: a longer prefix.
    first = make_place("two")
    saved = first.train("train.steps=10", "checkpoint.every=0")
    assert first.history(saved["run_id"], "loss") == [(step, at_two[step]) for step in range(1, 11)]
    losses = {2: [at_two[step] for step in range(11, 22)]}
    for world_size in (1, 3):
        place = make_place(f"world-{world_size}")
        shutil.copytree(first.folder / "runs", place.folder / "runs", dirs_exist_ok=True)
        sizes = [f"scaling.min_workers={world_size}", f"scaling.max_workers={world_size}"]
        result = place.train("--resume", saved["run_id"], "train.steps=21", "checkpoint.every=0", *sizes)
        assert result["world_size"] == world_size and result["run_id"] == saved["run_id"]
        history = dict(place.history(saved["run_id"], "loss"))
        assert list(history) == list(range(1, 22))
        losses[world_size] = [history[step] for step in range(11, 22)]
        assert dict(place.history(saved["run_id"], "world_size"))[11] == world_size
    for world_size in (1, 3):
        relative = [abs(a - b) / b for a, b in zip(losses[world_size], losses[2], strict=True)]
        assert relative[0] < 1e-5 and max(relative) < 1e-3, relative


def test_the_first_interrupt_saves_and_the_run_can_go_on(uninterrupted, place):
    _, expected = uninterrupted
    driver = place.start("data.ledger=ledger")
    wait_for_step(place, 30, attempt=1)
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 130 and "Traceback" not in err, err
    (saved,) = [row for row in place.checkpoints("ls", "runs/checkpoints") if row["step"] % EVERY] or [None]
    assert saved, "a checkpoint outside the regular ones"
    assert not workers_of(place)
    assert f"--resume {saved['run_id']}" in err
    result = place.train("--resume", "auto", "data.ledger=ledger")
    assert result["run_id"] == saved["run_id"] and result["status"] == "finished"
    place.assert_every_sample_once()
    second = [line["step"] for line in ledger(place.folder / "ledger") if line["attempt"] == 2]
    assert min(second) == saved["step"] + 1, "no step is trained twice"
    assert place.checkpoints("diff", expected["checkpoint"], result["checkpoint"])["bitwise_equal"]


def test_the_second_interrupt_ends_at_once(place):
    driver = place.start("data.ledger=ledger", "train.steps=100000", "checkpoint.every=0", "train.validate_every=0")
    wait_for_step(place, 20, attempt=1)
    victims = workers_of(place)
    for process in victims:
        process.suspend()  # A step that does not end: the first interrupt cannot be honoured.
    driver.send_signal(signal.SIGINT)
    for line in driver.stderr:
        if "once more ends at once" in line:
            break
    assert driver.poll() is None
    while driver.poll() is None:  # Those within half a second of the first are one with it.
        driver.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 130 and "Traceback" not in err, err
    psutil.wait_procs(victims, timeout=30)
    assert not any(process.is_running() for process in victims), "no orphan"


def test_an_interrupt_during_the_start_ends_it(place):
    driver = place.start()
    for line in driver.stderr:  # The driver tells when Ray is up and the workers begin.
        if "worker" in line:
            break
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=120)
    assert driver.returncode == 130 and "Traceback" not in err, err
    assert not list((place.folder / "runs" / "checkpoints").glob("*/log")), "no half run"


def test_a_run_that_has_finished_is_not_the_unfinished_one(uninterrupted):
    place, expected = uninterrupted
    done = place.run("--resume", "auto", "train.steps=2", "--json")
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["run_id"] != expected["run_id"] and again["steps"] == 2
    assert f"--resume {expected['run_id']} train.steps=N" in done.stderr, "and it is said"


@pytest.mark.parametrize(("steps", "told"), [(STEPS, "is finished, at step"), (STEPS // 2, "has come to step")])
def test_a_run_is_not_asked_for_steps_that_it_has_behind_it(uninterrupted, steps, told):
    place, expected = uninterrupted
    done = place.run("--resume", expected["run_id"], f"train.steps={steps}", code=2)
    assert f"{told} {STEPS}" in done.stderr and "train.steps=N" in done.stderr
    assert "starting Ray" not in done.stderr
    status = MlflowClient(f"sqlite:///{place.folder}/runs/mlflow.db").get_run(expected["run_id"]).info.status
    assert status == "FINISHED"


@pytest.mark.parametrize("change", ["model.hidden_size=64", "seed=1", "data.held_out_fraction=0.1", "optim.name=adamw"])
def test_another_model_other_data_or_another_seed_is_refused(uninterrupted, change):
    place, expected = uninterrupted
    done = place.run("--resume", expected["run_id"], change, code=2)
    key = {"data.held_out_fraction": "data"}.get(change.split("=")[0], change.split("=")[0])
    assert f"{key}: the checkpoint has" in done.stderr and "--resume never" in done.stderr
