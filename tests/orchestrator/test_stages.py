"""A run of stages is one run: killed at a border or between, gone on with, and grown where its batch grows."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from optim.config import OptimConfig
from orchestrator.config import RunConfig
from orchestrator.identity import identity, refuse_other
from tests.faults import FaultyMember
from tests.leading import Lead, Notes, config_of, tensors_of
from tests.ledger import assert_every_sample_once
from tests.processes import ProcessCluster
from workers.common.errors import ConfigError
from workers.data.config import SOURCE, SourceConfig
from workers.phases import Phase
from workers.recipe import StageConfig

FIRST, SECOND, STEPS = 6, 11, 19
"""The last steps of the three stages."""
STAGES = (
    StageConfig(name="rise", steps=FIRST, schedule="linear", lr=0, final_lr=1e-2, router_bias_rate=0.05),
    StageConfig(name="large", steps=SECOND - FIRST, schedule="cosine", final_lr=2e-3, global_batch=12),
    StageConfig(
        name="end",
        steps=STEPS - SECOND,
        schedule="linear",
        lr=5e-3,
        warmup_steps=2,
        router_bias_rate=0,
        weights={"second": 3, "first": 1},
    ),
)
BIAS = "buffer", "model.layers.1.mlp.gate.e_score_correction_bias"
TEXTS = Path(__file__).parents[2]


class Patient(FaultyMember):
    """A member that is at a border until somebody wants it to leave."""

    def on_mark(self, phase: Phase, step: int) -> None:
        super().on_mark(phase, step)
        while phase is Phase.REDUCE and step == FIRST and not self._pause[1].leave:
            time.sleep(0.01)


class Crash(BaseException):
    """The driver is dead."""


def staged(folder: Path, workers: tuple[int, int] = (2, 2)) -> RunConfig:
    config = config_of(
        folder,
        scaling={"min_workers": workers[0], "max_workers": workers[1]},
        train={"steps": 0, "global_batch": 6},
        checkpoint={"every": 4, "keep_last": 0},
        recovery={"hang_s": 120.0},
    )
    urls = {"first": "LICENSE", "second": "docs/log/2026-11-21.md"}
    sources = tuple(SourceConfig(name=name, urls=(str(TEXTS / url),)) for name, url in urls.items())
    data = replace(config.data, source=SOURCE, sources=sources, ledger=f"{folder}/ledger")
    return replace(config, data=data, train=replace(config.train, steps=0, stages=STAGES))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Lead(staged(folder), ProcessCluster({"a": 2}), folder) as lead:
        return folder, lead.wait()


def test_each_step_trains_with_what_its_stage_says(uninterrupted):
    folder, notes = uninterrupted
    config = staged(folder)
    rates = [row.lr for row in notes.rows]
    assert rates[:FIRST] == pytest.approx([1e-2 * step / 6 for step in range(1, 7)])
    assert rates[SECOND - 1] == pytest.approx(2e-3)
    assert rates[SECOND : SECOND + 3] == pytest.approx([3.5e-3, 5e-3, 5e-3 * 5 / 6]) and rates[-1] == 0
    assert [row.step_tokens for row in notes.rows] == [6 * 32] * FIRST + [12 * 32] * (STEPS - FIRST)
    assert [one.step for one in notes.validations] == [0, FIRST, SECOND, STEPS]
    assert notes.commits == [4, FIRST, 8, SECOND, 12, 16, STEPS], "a stage's end is a checkpoint"
    with Lead(config, ProcessCluster({"a": 2}), folder) as lead:
        assert_every_sample_once(folder / "ledger", config.train, config.seed, lead.corpora, config.data)
    first, before, last = (tensors_of(f"{folder}/run", lead.log.manifest(step))[BIAS] for step in (4, SECOND, STEPS))
    assert (last == before).all() and (first != before).any(), "it stands still in the last stage"


def test_killed_in_each_stage_and_at_both_borders_it_is_the_same_run(uninterrupted, tmp_path):
    """Driver, workers and keepers die at once: what is gone on from is in storage alone."""
    whole, calm = uninterrupted
    rows: dict[int, float] = {}
    for last in (3, FIRST, 9, SECOND, 14, 0):
        lead = Lead(staged(tmp_path), ProcessCluster({"a": 2}), tmp_path)
        notes = lead.notes
        notes.on_step = lambda step, last=last, lead=lead: kill(lead) if step == last else None
        with lead:
            if last:
                with pytest.raises(Crash):
                    lead.wait()
            else:
                lead.wait()
        rows |= {row.step: row.loss for row in notes.rows}
    assert list(rows.values()) == calm.losses, "bitwise"
    assert_equal_checkpoints(whole, tmp_path)


def kill(lead: Lead) -> None:
    lead.cluster.kill_node("a")
    raise Crash


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    first, second = (tensors_of(f"{folder}/run") for folder in (one, other))
    assert first.keys() == second.keys()
    assert [key for key, tensor in first.items() if tensor.tobytes() != second[key].tobytes()] == []


def test_the_group_grows_where_the_batch_does(uninterrupted, tmp_path):
    """The first step of the larger batch is the first one of the larger group."""
    config = staged(tmp_path, (2, 4))
    lead = Lead(config, ProcessCluster({"a": 2}, Patient), tmp_path)
    lead.notes.on_step = lambda step: lead.cluster.nodes.update(b=2) if step == 2 else None
    with lead:
        notes: Notes = lead.wait()
    assert notes.worlds[:FIRST] == [2] * FIRST and min(notes.worlds[FIRST:]) > 2
    assert notes.losses == pytest.approx(uninterrupted[1].losses, rel=1e-5)
    assert [row.lr for row in notes.rows] == [row.lr for row in uninterrupted[1].rows]
    assert_every_sample_once(tmp_path / "ledger", config.train, config.seed, lead.corpora, config.data)


def test_stages_that_are_not_reached_may_become_others(uninterrupted):
    folder, _ = uninterrupted
    config = staged(folder)
    with Lead(config, ProcessCluster({"a": 2}), folder) as lead:
        corpora, saved = lead.corpora, lead.log.identity or {}

    def refused(reached: int, *stages: StageConfig) -> str:
        changed = replace(config, train=replace(config.train, steps=0, stages=stages))
        try:
            refuse_other(str(folder), saved, identity(changed, corpora), reached)
        except ConfigError as error:
            return str(error)
        return ""

    first, second, third = STAGES
    assert refused(STEPS, *STAGES, StageConfig(name="more", steps=5, global_batch=24)) == ""
    assert refused(FIRST - 1, first, replace(second, global_batch=24), third) == ""
    assert "train.growth" in refused(FIRST + 3, first, replace(second, global_batch=24), third)
    assert "data.mixture" in refused(SECOND + 2, first, second, replace(third, weights={"first": 1}))
    assert "train.growth" in refused(FIRST + 3, replace(first, steps=FIRST + 1), second, third)
    assert "train.global_batch" in refused(2, replace(first, global_batch=8), second, third)
    assert "train.growth" in refused(FIRST + 3, replace(first, weights={"first": 1, "second": 1}, steps=STEPS))


def test_the_optimizer_of_a_run_has_no_word_in_stages_of_their_own(uninterrupted):
    config = replace(staged(uninterrupted[0]), optim=OptimConfig(lr=0.5, warmup_steps=3, schedule="wsd"))
    assert [config.recipe.learning_rate(row.step) for row in uninterrupted[1].rows] == [
        row.lr for row in uninterrupted[1].rows
    ]
