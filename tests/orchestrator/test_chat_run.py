"""A run on conversations is a run like any other: each is trained on once an epoch, whoever dies, and it goes on."""

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.config import RunConfig
from tests.chats import many, write
from tests.closeness import EPS, ROUNDINGS
from tests.faults import FaultyMember
from tests.leading import Lead, config_of
from tests.ledger import assert_every_sample_once, ledger
from tests.orchestrator.test_recovery import inject_at_start
from tests.orchestrator.test_stages import Crash, assert_equal_checkpoints, kill
from tests.processes import ProcessCluster
from workers.data.config import DataConfig
from workers.data.corpus import SPLITS
from workers.data.ends import DocumentEnds
from workers.data.packing import packing_of
from workers.phases import Phase

STEPS, ROWS = 6, 60


def chats(folder) -> RunConfig:
    """Conversations for one or two workers, over more than two epochs."""
    data = DataConfig(
        source=str(write(folder / "chat.jsonl", many(ROWS))),
        format="chat",
        prepared_url=f"{folder}/data",
        held_out_fraction=0.1,
        ledger=f"{folder}/ledger",
    )
    train = {"steps": STEPS, "global_batch": 6, "micro_batch": 2, "seq_len": 420}
    scaling, checkpoint = {"min_workers": 1, "max_workers": 2}, {"every": 2, "keep_last": 0}
    return replace(config_of(folder, scaling=scaling, train=train, checkpoint=checkpoint), data=data)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Lead(chats(folder), ProcessCluster({"a": 2}), folder) as lead:
        return folder, lead.wait()


def test_killed_and_gone_on_with_it_is_the_same_run(uninterrupted, tmp_path):
    """Driver, workers and keepers die at once, in the second epoch; bitwise, with the routers' biases."""
    whole, calm = uninterrupted
    killed = Lead(chats(tmp_path), ProcessCluster({"a": 2}), tmp_path)
    killed.notes.on_step = lambda step: kill(killed) if step == 3 else None
    with killed, pytest.raises(Crash):
        killed.wait()
    with Lead(chats(tmp_path), ProcessCluster({"a": 2}), tmp_path) as rest:
        rest.wait()
    assert [row.step for row in rest.notes.rows] == [3, 4, 5, 6]
    assert [*killed.notes.losses[:2], *rest.notes.losses] == calm.losses
    assert_equal_checkpoints(whole, tmp_path)


@pytest.mark.numeric
def test_every_conversation_is_trained_on_once_an_epoch_and_a_death_changes_nothing(uninterrupted, tmp_path):
    """Of two workers one dies in step 4; the other goes on, until a third comes."""
    lead = Lead(chats(tmp_path), ProcessCluster({"a": 2}, FaultyMember), tmp_path)
    inject_at_start(lead, 0, Phase.COMPUTE, 4, "kill", 1)
    with lead:
        lead.wait()
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

    _, calm = uninterrupted
    assert lead.notes.losses == pytest.approx(calm.losses, rel=ROUNDINGS * EPS)
    assert [row.tokens for row in lead.notes.rows] == [row.tokens for row in calm.rows]
