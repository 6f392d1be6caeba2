"""What one rank learns from: its micro-batch slots of a step, and its part of the held-out sequences, as batches."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.data.order import samples_of_slot, slots_of_rank
from workers.data.tokens import TokenSplit
from workers.objective import Batch, batch_of
from workers.task import Place, Task


@dataclass(frozen=True)
class Slot:
    """A micro-batch slot of a step, read."""

    number: int
    samples: list[int]
    batch: Batch


class Feed:
    """One rank's batches.

    Args:
        task: what is trained on, and in which order.
        member: this rank's place.
    """

    def __init__(self, task: Task, member: Place) -> None:
        self.task, self.member = task, member
        corpus = task.corpus
        self.train = TokenSplit(corpus, corpus.train, task.train.seq_len)
        self.held_out = TokenSplit(corpus, corpus.validation, task.train.seq_len)
        self.sources = [""]
        """Names, in the order of their numbers; one without a name where the config has none."""
        self.validation_weights, self.bytes_per_token = [1.0], [1.0]
        """Of each source: its share of the mean validation loss, and the text of its held-out split over the tokens."""
        self.slots = slots_of_rank(task.train.slots, member.world_size, member.rank)
        self.ledger = _Ledger(task, member)

    def step(self, step: int) -> list[Slot]:
        """Return this rank's slots of a step.

        A rank without one gets one in which nothing counts: the reduction needs a gradient from everybody.
        """
        train, read = self.task.train, []
        for number in self.slots or [0]:
            samples = samples_of_slot(
                self.task.seed, step, number, train.global_batch, train.micro_batch, self.train.num_samples
            )
            batch = self.batch(self.train, samples)
            read.append(Slot(number, samples, batch if self.slots else batch.without_targets()))
        return read

    def validation(self) -> Iterator[tuple[int, Batch]]:
        """Yield this rank's part of the held-out sequences, spread evenly, by source; the same ones every time."""
        train, split = self.task.train, self.held_out
        count = min(train.validate_sequences, split.num_samples)
        samples = [i * split.num_samples // count for i in range(count)]
        chunks = [samples[i : i + train.micro_batch] for i in range(0, count, train.micro_batch)]
        for chunk in slots_of_rank(len(chunks), self.member.world_size, self.member.rank):
            yield 0, self.batch(split, chunks[chunk])

    def batch(self, split: TokenSplit, samples: list[int]) -> Batch:
        """Return what is learned from samples of a split."""
        return batch_of(torch.from_numpy(split.batch(samples)))

    def trained(self, step: int, slot: Slot) -> None:
        """Write down that a slot was trained on."""
        if self.slots:
            self.ledger.add(step, slot.number, slot.samples)


def counted(slots: Iterable[Slot]) -> int:
    """Return how many of their targets count."""
    return sum(slot.batch.counted for slot in slots)


class _Ledger:
    """Writes down which samples this process trained on, one line a slot, for whoever wants proof."""

    def __init__(self, task: Task, member: Place) -> None:
        self.file = None
        self.place = {"attempt": task.attempt, "generation": member.generation}
        if task.data.ledger:
            folder = Path(task.data.ledger)
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{task.attempt:04d}-{member.generation:04d}-{member.rank:05d}.jsonl"
            self.file = (folder / name).open("a", buffering=1)

    def add(self, step: int, slot: int, samples: list[int]) -> None:
        if self.file:
            self.file.write(json.dumps({**self.place, "step": step, "slot": slot, "samples": samples}) + "\n")
