"""A run on conversations is a run like any other: each is trained on once an epoch, whoever dies."""

from dataclasses import replace

import numpy as np
import pytest

from tests.chats import many, write
from tests.closeness import EPS, ROUNDINGS
from tests.faults import FaultyMember
from tests.leading import Lead, config_of
from tests.ledger import assert_every_sample_once, ledger
from tests.orchestrator.test_recovery import inject_at_start
from tests.processes import ProcessCluster
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from workers.data.config import DataConfig
from workers.data.corpus import SPLITS
from workers.data.ends import DocumentEnds
from workers.data.packing import packing_of
from workers.phases import Phase
from workers.reports import StepDone
from workers.task import Task

STEPS, ROWS = 6, 60


def chat_run(folder) -> Lead:
    """Train with two workers, of which one dies in step 4; the other goes on, until a third comes."""
    data = DataConfig(
        source=str(write(folder / "chat.jsonl", many(ROWS))),
        format="chat",
        prepared_url=f"{folder}/data",
        held_out_fraction=0.1,
        ledger=f"{folder}/ledger",
    )
    train = {"steps": STEPS, "global_batch": 6, "micro_batch": 2, "seq_len": 420}
    config = replace(config_of(folder, scaling={"min_workers": 1, "max_workers": 2}, train=train), data=data)
    lead = Lead(config, ProcessCluster({"a": 2}, FaultyMember), folder)
    inject_at_start(lead, 0, Phase.COMPUTE, 4, "kill", 1)
    with lead:
        lead.wait()
    return lead


def losses_of(rank: int, world_size: int, task: Task) -> list[tuple[float, int]]:
    trainer, told = trainer_of(rank, world_size, task)
    trainer.run()
    return [(fields["loss"], fields["tokens"]) for fields in told.of(StepDone)]


@pytest.mark.numeric
def test_every_conversation_is_trained_on_once_an_epoch_and_a_death_changes_nothing(tmp_path):
    lead = chat_run(tmp_path)
    (corpus,), folder, train = lead.corpora, tmp_path / "ledger", lead.config.train
    assert len(lead.notes.faults) == 1 and {1, 2} <= {*lead.notes.worlds}
    assert_every_sample_once(folder, train, lead.config.seed, lead.corpora, lead.config.data)
    packing, held_out = (packing_of(corpus, getattr(corpus, split), train.seq_len) for split in SPLITS)
    assert packing.num_documents + held_out.num_documents == ROWS and not packing.too_long + held_out.too_long

    last = {(line["step"], line["slot"]): line["samples"] for line in ledger(folder)}
    sequences = [packing.documents(sample) for key in sorted(last) for sample in last[key]]
    size, ends = packing.num_samples, np.cumsum(DocumentEnds(corpus, corpus.train).lengths(0)).tolist()
    assert 2 * size <= len(sequences) == STEPS * train.global_batch
    for epoch in range(2):
        part = [one for sequence in sequences[epoch * size : (epoch + 1) * size] for one in sequence]
        assert sorted(part) == [*zip([0, *ends[:-1]], ends, strict=True)], "each whole, and once"

    data = replace(lead.config.data, ledger="")
    (alone,) = run_ranks(1, losses_of, replace(lead.attempt.task, data=data, manifest=None))
    assert lead.notes.losses == pytest.approx([loss for loss, _ in alone], rel=ROUNDINGS * EPS)
    assert [row.tokens for row in lead.notes.rows] == [tokens for _, tokens in alone]
