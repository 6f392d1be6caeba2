"""The elastic batch: the world size decides who computes a slot, and nothing else."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from optim.config import OptimConfig
from optim.polynomials import coefficients
from orchestrator.group.keeper import Keeper
from tests.closeness import ADAMW_EPS, EPS, ROUNDINGS, assert_close_weights, gain
from tests.ranks import run_ranks
from tests.workers.test_moonlight import TINY
from workers.common.errors import TrainingError
from workers.config import CheckpointConfig, StorageConfig
from workers.data.config import DataConfig, SourceConfig
from workers.data.prepare import prepare
from workers.phases import Phase
from workers.recipe import TrainConfig
from workers.reports import ShardWritten, StepDone, Validated
from workers.task import KeeperLinks, Place, Task

pytestmark = pytest.mark.numeric

TEXT = Path(__file__).parents[2] / "LICENSE"
"""It stays as it is: with a test's own text, what is trained on changed with each line of the test."""


def task_of(folder, **train) -> Task:
    data = DataConfig(source=str(TEXT), prepared_url=f"{folder}/data", held_out_fraction=0.2)
    settings = {"steps": 4, "global_batch": 6, "micro_batch": 2, "seq_len": 32, "validate_sequences": 5}
    return Task(
        model=TINY,
        optim=OptimConfig(lr=1e-2, eps=ADAMW_EPS),
        data=data,
        train=TrainConfig(**{**settings, "sample_prompt": "", **train}),
        checkpoint=CheckpointConfig(every=2),
        seed=3,
        corpora=prepare(data),
        run_url=f"{folder}/run",
        attempt=1,
        manifest=None,
    )


def trained(
    rank: int,
    world_size: int,
    task: Task,
    pause_at: int = 0,
    poison: tuple[int, ...] = (),
    breaks: tuple[int, str] = (0, ""),
) -> dict:
    """Train.

    Args:
        rank: of this process.
        world_size: of the group.
        task: what to train.
        pause_at: the last rank asks for a pause there.
        poison: steps in which the loss of rank 0 is NaN; negative ones are of validations.
        breaks: step after whose update something on the last rank is not finite, and what.
    """
    from workers.controls import Controls, Pause
    from workers.engine import build_engine, default_device
    from workers.loop import Trainer
    from workers.state import Counters

    reports: list = []
    marks: list[tuple[Phase, int]] = []
    engine = build_engine(task.model, task.optim, task.train, task.seed, default_device())
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    keeper = Keeper("127.0.0.1", "secret", StorageConfig())
    links = KeeperLinks(keeper=keeper.address())
    counters = Counters()
    controls = Controls(
        report=lambda kind, **fields: reports.append((kind, fields)),
        pause=lambda: Pause(*[rank == world_size - 1 and counters.step + 1 == pause_at] * 2),
        links=lambda: links,
        mark=lambda phase, step: marks.append((phase, step)),
    )
    member = Place(generation=1, rank=rank, world_size=world_size, host="", port=0, links=links)
    trainer = Trainer(task, member, engine, counters, controls)
    loss = trainer._loss

    def poisoned(forward, batch):
        step = counters.step + 1 if forward is engine.engine else -counters.step
        bad = rank == 0 and step in poison
        return loss(forward, batch) * (math.nan if bad else 1.0)

    def broken(*_) -> None:
        step, what = breaks
        if rank == world_size - 1 and counters.step + 1 == step:
            if what == "bias":
                next(b for name, b in engine.model.named_buffers() if "bias" in name)[1] = math.nan
            else:
                for state in engine.optimizer.flat_state(rank):  # DeepSpeed shows one group at a time.
                    if what in state.tensors:
                        state.tensors[what][-3] = -math.inf

    engine.optimizer.register_step_post_hook(broken)
    trainer._loss = poisoned
    try:
        outcome = trainer.run()
    except TrainingError as error:
        outcome = str(error)
    shards = shards_of(keeper)
    return {
        "outcome": outcome,
        "step": counters.step,
        "losses": [fields["loss"] for kind, fields in reports if kind is StepDone],
        "validation": [(fields["step"], fields["loss"]) for kind, fields in reports if kind is Validated],
        "saved": sorted(report.step for report in shards),
        "shards": shards,
        "marks": marks,
        "skipped": counters.skipped,
        "tokens": counters.tokens,
        "before": before,
        "weights": {name: p.detach().clone() for name, p in engine.model.named_parameters()},
        "biases": {name: b.clone() for name, b in engine.model.named_buffers() if "bias" in name},
    }


def shards_of(keeper: Keeper) -> list[ShardWritten]:
    """Wait for the keeper's uploads."""
    keeper._uploads.shutdown()
    return [report for report in keeper.poll(0) if isinstance(report, ShardWritten)]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_each_held_out_sequence_of_each_source_is_validated_by_one_rank(tmp_path, world_size):
    """Of one source there are seven, in four batches; of the other as many as it has, in fewer than there are ranks."""
    from workers.feed import Feed

    (small := tmp_path / "small").write_text(TEXT.read_text()[:800])
    sources = tuple(SourceConfig(name=url.name, urls=(str(url),)) for url in (TEXT, small))
    data = DataConfig(sources=sources, prepared_url=f"{tmp_path}/data", held_out_fraction=0.2)
    task = replace(task_of(tmp_path, validate_sequences=7), data=data, corpora=prepare(data))

    def seen(world_size: int) -> list:
        at = {"generation": 1, "world_size": world_size, "host": "", "port": 0}
        places = [Place(rank=rank, **at) for rank in range(world_size)]
        parts = [part for place in places for part in Feed(task, place).validation()]
        return sorted((source, *row) for source, batch in parts for row in batch.inputs.tolist())

    alone = seen(1)
    assert [source for source, *_ in alone].count(0) == 7 and 2 <= len(alone) - 7 < 7
    assert len({tuple(row) for row in alone}) == len(alone) and seen(world_size) == alone


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_uneven_and_idle_ranks_train_the_same_model(tmp_path, world_size):
    """Three slots: two ranks have 1 and 2 of them, and of four ranks one has none."""
    task = task_of(tmp_path)
    (alone,) = run_ranks(1, trained, task)
    together = run_ranks(world_size, trained, task)
    assert alone["outcome"] == "finished" and alone["tokens"] == together[0]["tokens"] == 4 * 6 * 32
    for (step, a), (other, b) in zip(alone["validation"], together[0]["validation"], strict=True):
        assert step == other and b == pytest.approx(a, rel=ROUNDINGS * EPS)
    assert together[0]["losses"] == pytest.approx(alone["losses"], rel=ROUNDINGS * EPS)
    # A gradient is a sum over tokens of which much cancels: what is left is off by some four times as much (measured).
    enlarged = 4 * gain(coefficients(task.optim.ns_coefficients, task.optim.ns_steps))
    for result in together:
        for name, weight in result["weights"].items():
            assert_close_weights(weight, alone["weights"][name], alone["before"][name], enlarged, name)
        for name, bias in result["biases"].items():
            assert bias.equal(alone["biases"][name]), "the experts' load is counted over the whole batch"
        assert result["saved"] == [2, 4], "every rank writes its shard"
    assert not any(result["losses"] for result in together[1:]), "rank 0 alone tells of steps"


def test_long_parts_show_that_they_get_on(tmp_path):
    """Otherwise the watchdog takes a large validation, or a sample of many bytes, for a hang."""
    task = task_of(tmp_path, validate_every=2, sample_prompt="import", sample_bytes=30)
    (alone,) = run_ranks(1, trained, task)
    chunks = 3  # Of five sequences, two at a time; and one mark when they are done.
    assert alone["marks"].count((Phase.VALIDATE, 0)) == alone["marks"].count((Phase.VALIDATE, 4)) == chunks + 1
    assert alone["marks"].count((Phase.SAMPLE, 4)) == 30, "a mark for each byte of the sample"
    assert in_order(alone["marks"])


def in_order(marks: list[tuple[Phase, int]]) -> bool:
    """Tell whether a thread has never gone back: the watchdog would take the one that is ahead for the one behind."""
    places = [(step, phase.order) for phase, step in marks]
    return places == sorted(places)


def test_one_ranks_pause_stops_all_at_the_same_boundary(tmp_path):
    results = run_ranks(3, trained, task_of(tmp_path, steps=50), 3)
    assert {(result["outcome"], result["step"]) for result in results} == {("paused", 3)}
    assert all(result["saved"] == [2, 3] and in_order(result["marks"]) for result in results)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    results = run_ranks(2, trained, task_of(tmp_path, steps=6), 0, (3,))
    for result in results:
        assert result["outcome"] == "finished" and result["skipped"] == 1 and result["step"] == 6
        assert all(weight.isfinite().all() for weight in result["weights"].values())
    losses = results[0]["losses"]
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, True, True]


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    bad = (1, 3, 4, 5)
    results = run_ranks(2, trained, task_of(tmp_path, steps=6, max_skipped_in_a_row=2), 0, bad)
    for result in results:
        assert "step 5: the gradient is not finite" in result["outcome"] and "3. time in a row" in result["outcome"]
        assert result["saved"] == [2, 4] and result["step"] == 4


@pytest.mark.parametrize("what", ["weight", "momentum_buffer", "bias"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_state_that_is_not_finite_ends_the_run_by_name_before_it_counts(tmp_path, world_size, what):
    """Everybody says the same, and neither the snapshot nor the checkpoint of that step comes to be."""
    results = run_ranks(world_size, trained, task_of(tmp_path, steps=6), 0, (), (4, what))
    (outcome,) = {result["outcome"] for result in results}
    assert outcome.startswith("step 4: its update has made the ") and "optim.lr" in outcome
    expected = r"mlp.gate.e_score_correction_bias" if what == "bias" else rf"{what} of model\.layers\.[\w.]+"
    assert re.search(rf"the (\S+\.)?{expected} infinite or NaN", outcome), outcome
    assert all(result["saved"] == [2] and result["step"] == 3 for result in results)


def test_a_validation_loss_that_is_not_finite_ends_the_run_before_its_checkpoint(tmp_path):
    task = task_of(tmp_path, steps=6, validate_every=4)
    results = run_ranks(2, trained, task, 0, (-4,))
    for result in results:
        assert result["outcome"] == "step 4: the validation loss is nan; lower optim.lr"
        assert result["saved"] == [2]
    assert [step for step, _ in results[0]["validation"]] == [0]
