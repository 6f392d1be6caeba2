"""The record of who trained on which samples (`data.ledger`), held against the run's whole order."""

import json
from pathlib import Path
from typing import Any

from workers.config import TrainConfig
from workers.data.order import samples_of_slot


def ledger(folder: Path) -> list[dict[str, Any]]:
    """Return all lines; a killed process may have cut its last one."""
    texts = [text for file in sorted(folder.glob("*.jsonl")) for text in file.read_text().splitlines()]
    return [json.loads(text) for text in texts if text.endswith("}")]


def assert_every_sample_once(folder: Path, train: TrainConfig, seed: int, num_tokens: int) -> None:
    """The last generation that ran a step is the one that counts; together they are the run's whole order."""
    counted: dict[tuple[int, int], tuple[tuple[int, int], list[int]]] = {}
    for line in ledger(folder):
        key, turn = (line["step"], line["slot"]), (line["attempt"], line["generation"])
        assert key not in counted or counted[key][0] != turn, "a slot twice in one generation"
        if key not in counted or counted[key][0] < turn:
            counted[key] = turn, line["samples"]
    num_samples = (num_tokens - 1) // train.seq_len
    expected = {
        (step, slot): samples_of_slot(seed, step, slot, train.global_batch, train.micro_batch, num_samples)
        for step in range(1, train.steps + 1)
        for slot in range(train.slots)
    }
    assert {key: samples for key, (_, samples) in counted.items()} == expected
