"""What a journal says of a run's steps, and how a replay is judged."""

import math

import pytest

from jobs.record import TOLERANCE, Record, attempt_of, compare, read_record
from orchestrator.record.events import DriverStarted, read_event
from orchestrator.record.journal import Row
from orchestrator.record.provenance import Provenance, changes, provenance, source_files
from workers.common.errors import ConfigError


def started(attempt: int, lr: float = 1e-2, url: str = "s3://a") -> DriverStarted:
    config = {"optim": {"lr": lr}, "checkpoint": {"url": url}, "seed": 0}
    return DriverStarted(time=1.0, step=0, attempt=attempt, config=config, corpus="c")


def row(step: int, loss: float, grad_norm: float = 1.0) -> Row:
    return Row("train", step, 1.0, {"loss": loss, "grad_norm": grad_norm, "world_size": 2})


def rows(losses: list[float], norm: float = 1.0) -> Record:
    return read_record([started(1), *(row(step, loss, norm) for step, loss in enumerate(losses, 1))])


def test_a_step_that_was_trained_again_counts_as_it_was_the_last_time():
    record = read_record([started(1), row(1, 5.0), row(2, 4.0), started(2), row(2, 3.0), row(3, 2.0)])
    assert [record.steps[step]["loss"] for step in (1, 2, 3)] == [5.0, 3.0, 2.0]
    assert record.by == {1: 1, 2: 2, 3: 2}


def test_a_stretch_has_one_config():
    places = read_record([started(1), row(1, 5.0), started(2, url="s3://b"), row(2, 4.0)])
    assert attempt_of(places, 1, 2).number == 2, "another place is no other training"
    rates = read_record([started(1), row(1, 5.0), started(2, lr=2e-2), row(2, 4.0)])
    with pytest.raises(ConfigError, match="config changed at step 2"):
        attempt_of(rates, 1, 2)
    assert attempt_of(rates, 2, 2).config["optim"]["lr"] == 2e-2


def test_steps_that_are_not_on_record_are_named():
    with pytest.raises(ConfigError, match="step 9 is not on record; steps 1 to 2 are"):
        attempt_of(rows([5.0, 4.0]), 1, 9)
    with pytest.raises(ConfigError, match="step 1 is not on record; no step is"):
        attempt_of(Record(), 1, 1)
    with pytest.raises(ConfigError, match="step 2 is not on record: its driver was lost"):
        attempt_of(read_record([started(1), row(1, 5.0), started(2), row(3, 4.0)]), 1, 3)
    newer = read_event({"event": "DriverStarted", "attempt": "of another form", "time": 1.0, "step": 0})
    for lacks in (DriverStarted(time=1.0, step=0, attempt=2), newer):
        with pytest.raises(ConfigError, match="step 2 was put down by a version that did not record its config"):
            attempt_of(read_record([started(1), row(1, 5.0), lacks, row(2, 4.0)]), 1, 2)


def test_equal_floats_are_bitwise_equal_and_one_bit_is_not():
    losses = [5.0, 0.1 + 0.2, math.nan]
    assert compare(rows(losses), rows(losses), TOLERANCE).bitwise_equal
    nearly = compare(rows(losses), rows([5.0, 0.3, math.nan]), TOLERANCE)
    assert not nearly.bitwise_equal and nearly.first_beyond is None
    assert nearly.first_different and (nearly.first_different.step, nearly.first_different.metric) == (2, "loss")


def test_the_first_step_beyond_the_tolerance_is_named():
    found = compare(rows([5.0, 4.0, 3.0]), rows([5.001, 4.1, 9.0]), TOLERANCE)
    assert found.first_beyond and found.first_beyond.step == 2
    assert found.first_beyond.relative == pytest.approx(0.025)
    largest = found.largest("loss")
    assert largest and largest.step == 3
    assert compare(rows([1.0], norm=1.0), rows([1.0], norm=1.005), TOLERANCE).first_beyond is None
    assert compare(rows([1.0], norm=1.0), rows([1.0], norm=1.02), TOLERANCE).first_beyond is not None


def test_a_number_in_place_of_none_is_beyond_any_tolerance():
    found = compare(rows([math.nan]), rows([5.0]), 1.0)
    assert found.first_beyond and found.first_beyond.relative == math.inf


def test_code_that_can_change_a_loss_is_named():
    now = provenance()
    assert changes(now, now) == []
    assert "workers/loop.py" in now.files and "jobs/configs/demo.yaml" in now.files
    files = {**source_files(), "workers/loop.py": "other", "jobs/cli/runs.py": "other"}
    then = Provenance(commit="abc", versions={**now.versions, "torch": "1.0", "mlflow": "1.0"}, files=files)
    torch, sources = changes(then, now)
    assert torch.startswith("torch: the run had 1.0") and "jobs/cli/runs.py" not in sources
    assert "1 source file(s) (commit abc" in sources and sources.endswith("workers/loop.py")
