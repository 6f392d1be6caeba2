"""The record of who trained on which samples (`data.ledger`), held against the run's whole order."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optim.config import OptimConfig
from workers.data.config import DataConfig
from workers.data.corpus import Corpus
from workers.feed import indices_of_slot, order_of
from workers.recipe import TrainConfig, recipe_of


def ledger(folder: Path) -> list[dict[str, Any]]:
    """Return all lines; a killed process may have cut its last one."""
    texts = [text for file in sorted(folder.glob("*.jsonl")) for text in file.read_text().splitlines()]
    return [json.loads(text) for text in texts if text.endswith("}")]


def samples_in_order(folder: Path, steps: Iterable[int]) -> list[int]:
    """Return the samples of some steps of one undisturbed attempt, in the order of their slots."""
    lines = sorted(ledger(folder), key=lambda line: (line["step"], line["slot"]))
    return [sample for line in lines if line["step"] in set(steps) for sample in line["samples"]]


def assert_every_sample_once(
    folder: Path,
    train: TrainConfig,
    seed: int,
    corpora: tuple[Corpus, ...],
    data: DataConfig | None = None,
) -> None:
    """The last generation that ran a step is the one that counts; together they are the run's whole order."""
    counted: dict[tuple[int, int], tuple[tuple[int, int], list[Any]]] = {}
    for line in ledger(folder):
        key, turn = (line["step"], line["slot"]), (line["attempt"], line["generation"])
        assert key not in counted or counted[key][0] != turn, "a slot twice in one generation"
        if key not in counted or counted[key][0] < turn:
            sources = line.get("sources", [""] * len(line["samples"]))
            counted[key] = turn, list(zip(sources, line["samples"], strict=True))
    recipe = recipe_of(train, OptimConfig())
    order = order_of(data or DataConfig(), recipe, train.seq_len, seed, corpora)
    names, micro = [corpus.name for corpus in corpora], train.micro_batch

    def drawn(step: int, slot: int) -> list[Any]:
        found = order.at(indices_of_slot(recipe, step, micro, slot))
        return [(names[source], int(sample)) for source, sample in zip(found.source, found.sample, strict=True)]

    slots = {step: range(recipe.at(step).global_batch // micro) for step in range(1, train.steps + 1)}
    expected = {(step, slot): drawn(step, slot) for step in slots for slot in slots[step]}
    assert {key: samples for key, (_, samples) in counted.items()} == expected
