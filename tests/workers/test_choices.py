"""What saves memory changes nothing that is learned: each choice against the plain path, and a change between them."""

import itertools
from dataclasses import replace

import pytest

from optim.polynomials import coefficients
from tests.closeness import EPS, ROUNDINGS, assert_close_weights, gain
from tests.ranks import Ranks, run_ranks
from tests.trainer import trainer_of
from tests.workers.test_loop import task_of, trained
from workers.config import TelemetryConfig
from workers.reports import StepDone
from workers.task import Task

pytestmark = pytest.mark.numeric

PLAIN = {"recompute": "none", "logits": "whole", "gradients": "whole"}
CHOICES = [
    dict(zip(PLAIN, choice, strict=True))
    for choice in itertools.product(("none", "1", "all"), ("whole", "chunked"), ("whole", "partitioned"))
]


def overlapping(rank: int, world_size: int, task: Task) -> dict:
    """Train as on a GPU: gradients leave during the backward pass, weights arrive during the next forward pass."""
    import workers.engine
    import workers.settings

    as_there = lambda train, kind: train.overlap  # noqa: E731
    before = workers.settings.overlapped
    workers.engine.overlapped = workers.settings.overlapped = as_there
    try:
        return trained(rank, world_size, task)
    finally:
        workers.engine.overlapped = workers.settings.overlapped = before


def sent(rank: int, world_size: int, task: Task) -> float:
    """Train a step, and return the bytes that a rank sends for gradients."""
    trainer, told = trainer_of(rank, world_size, replace(task, telemetry=TelemetryConfig(every=1)))
    trainer.run()
    trainer.engine.destroy()
    return told.of(StepDone)[0]["measured"]["bytes_sent/reduce"] if rank == 0 else 0.0


def choice_of(task: Task, choice: dict[str, str]) -> Task:
    return replace(task, train=replace(task.train, **choice))


def assert_the_same(found: dict, plain: dict, task: Task, of: str) -> None:
    assert found["outcome"] == "finished" and found["tokens"] == plain["tokens"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=ROUNDINGS * EPS), of
    for (step, loss), (other, exact) in zip(found["validation"], plain["validation"], strict=True):
        assert step == other and loss == pytest.approx(exact, rel=ROUNDINGS * EPS), of
    # As between world sizes: what is left of a sum over tokens is off by some four times its rounding.
    enlarged = 4 * gain(coefficients(task.optim.ns_coefficients, task.optim.ns_steps))
    for name, weight in found["weights"].items():
        assert_close_weights(weight, plain["weights"][name], plain["before"][name], enlarged, f"{of} {name}")
    for name, bias in found["biases"].items():
        assert bias.equal(plain["biases"][name]), f"{of}: the experts' load is counted once, over the whole batch"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_choice_trains_the_model_of_the_plain_path(tmp_path, world_size):
    """Three slots: two ranks have 1 and 2 of them, and of four ranks one has none."""
    task = task_of(tmp_path, steps=5)
    (plain,) = run_ranks(1, trained, choice_of(task, PLAIN))
    ranks = Ranks(world_size)
    try:
        for choice in CHOICES:
            results = ranks.run(trained, choice_of(task, choice))
            assert_the_same(
                {**results[-1], "losses": results[0]["losses"], "validation": results[0]["validation"]},
                plain,
                task,
                f"{world_size} {choice}",
            )
    finally:
        ranks.close()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_what_travels_under_the_passes_arrives(tmp_path, world_size):
    """Gradients are then reduced in the order of the backward pass, so three ranks' sums are rounded otherwise."""
    task, ranks = task_of(tmp_path, steps=5, validate_every=2), Ranks(world_size)
    try:
        for gradients, recomputed in (("whole", "none"), ("partitioned", "all")):
            chosen = choice_of(task, {**PLAIN, "gradients": gradients, "recompute": recomputed})
            plain, found = ranks.run(trained, chosen), ranks.run(overlapping, chosen)
            for one, other in zip(found, plain, strict=True):
                assert_the_same(one, other, task, f"{world_size} {gradients}")
                if world_size == 2:
                    assert all(weight.equal(other["weights"][name]) for name, weight in one["weights"].items())
    finally:
        ranks.close()


def test_partitioned_gradients_are_sent_for_each_micro_batch(tmp_path):
    """Three slots on two ranks: two rounds, as one rank runs a micro-batch in which nothing counts."""
    task = task_of(tmp_path, steps=1)
    whole, parts = (run_ranks(2, sent, choice_of(task, {"gradients": way}))[0] for way in ("whole", "partitioned"))
    assert parts == 2 * whole > 0
