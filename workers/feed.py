"""What one rank learns from: its micro-batch slots of a step, and its part of the held-out sequences, as batches."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from workers.data.config import DataConfig
from workers.data.conversations import PackedSplit, split_of
from workers.data.corpus import Corpus, Shard
from workers.data.ends import DocumentEnds
from workers.data.order import Drawn, Order, most_slots, slots_of_rank
from workers.data.packing import samples_in
from workers.objective import Batch, batch_of
from workers.recipe import Recipe
from workers.task import Place, Task


def order_of(data: DataConfig, recipe: Recipe, seq_len: int, seed: int, corpora: tuple[Corpus, ...]) -> Order:
    """Return the order in which a run reads its samples, whatever its world size."""
    return Order(
        seed,
        [(corpus.name, samples_in(corpus, corpus.train, seq_len)) for corpus in corpora],
        [(recipe.samples_before(step), shares) for step, shares in recipe.mixtures(data)],
        data.window,
    )


def indices_of_slot(recipe: Recipe, step: int, micro_batch: int, slot: int) -> np.ndarray:
    """Return the global sample indices of one micro-batch slot of a step."""
    return indices_of_step(recipe, step)[slot * micro_batch :][:micro_batch]


def indices_of_step(recipe: Recipe, step: int) -> np.ndarray:
    """Return the global sample indices of a step, 1 being the first, slot after slot."""
    return np.arange(recipe.samples_before(step), recipe.samples_before(step + 1))


@dataclass(frozen=True)
class Slot:
    """A micro-batch slot of a step, read."""

    number: int
    counts: bool
    """Whether it is this rank's: else nothing in its batch counts."""
    drawn: Drawn
    """Its samples."""
    batch: Batch


class Part:
    """One split of all sources."""

    def __init__(self, shards: list[tuple[Corpus, tuple[Shard, ...]]], seq_len: int, cache_gb: float) -> None:
        self.seq_len = seq_len
        self.tokens = [split_of(*one, seq_len, cache_gb) for one in shards]
        self.ends = [DocumentEnds(*one) for one in shards]

    def documents(self, source: int, samples: np.ndarray) -> np.ndarray:
        """Return the number of the document of each token within its sample, `[samples, seq_len + 1]`."""
        if isinstance(packed := self.tokens[source], PackedSplit):
            return np.stack([packed.documents(sample) for sample in samples.tolist()])
        return np.stack([self.ends[source].of_sample(sample, self.seq_len) for sample in samples.tolist()])

    def counts(self, source: int, samples: np.ndarray) -> np.ndarray | bool:
        """Return which tokens of samples are learned, `[samples, seq_len + 1]`; of text, all."""
        if isinstance(packed := self.tokens[source], PackedSplit):
            return np.stack([packed.counts(sample) for sample in samples.tolist()])
        return True

    def close(self) -> None:
        """End what reads ahead."""
        for tokens in self.tokens:
            tokens.close()


class Feed:
    """One rank's batches.

    Args:
        task: what is trained on, and in which order.
        member: this rank's place.
    """

    def __init__(self, task: Task, member: Place) -> None:
        self.task, self.member = task, member
        self.sources = [corpus.name for corpus in task.corpora]
        self.recipe, self.micro_batch = task.recipe, task.train.micro_batch
        self.order = order_of(task.data, task.recipe, task.train.seq_len, task.seed, task.corpora)
        size = (task.train.seq_len, task.data.cache_gb)
        self.train = Part([(corpus, corpus.train) for corpus in task.corpora], *size)
        self.held_out = Part([(corpus, corpus.validation) for corpus in task.corpora], *size)
        shares = task.recipe.mixtures(task.data)[0][1]
        self.validation_weights = [share / sum(shares) for share in shares]
        """Of each source, in the mean validation loss: the same before and after other weights hold."""
        self.bytes_per_token = [corpus.bytes_per_token for corpus in task.corpora]
        """Of each source's held-out split."""
        self.ledger = _Ledger(task, member)
        self._waited = 0.0
        kept = 4 * most_slots(task.train.slots, member.world_size)  # Read-ahead asks first, the step again.
        self.drawn = lru_cache(kept)(self._drawn)

    def _slots(self, step: int) -> tuple[range, int]:
        """Return this rank's slots of a step, and how many micro-batches it runs in which nothing counts."""
        slots, world_size = self.recipe.at(step).global_batch // self.micro_batch, self.member.world_size
        mine = slots_of_rank(slots, world_size, self.member.rank)
        # A reduction needs a gradient from everybody: the one of whole gradients at the end of a step, those of
        # partitioned ones after each micro-batch of the rank that has most.
        partitioned = self.task.train.gradients == "partitioned"
        return mine, most_slots(slots, world_size) - len(mine) if partitioned else int(not mine)

    def step(self, step: int) -> list[Slot]:
        """Return this rank's slots of a step, after those in which nothing counts."""
        read = []
        mine, fillers = self._slots(step)
        for number, counts in [*[(0, False)] * fillers, *((slot, True) for slot in mine)]:
            drawn = self.drawn(step, number)
            batch = self.batch(self.train, drawn)
            read.append(Slot(number, counts, drawn, batch if counts else batch.without_targets()))
        return read

    def _drawn(self, step: int, slot: int) -> Drawn:
        """Return the samples of a slot."""
        return self.order.at(indices_of_slot(self.recipe, step, self.micro_batch, slot))

    def read_ahead(self, step: int) -> None:
        """Begin to read this rank's slots of a later step."""
        for number in self._slots(step)[0] or [0]:
            drawn = self.drawn(step, number)
            for source, tokens in enumerate(self.train.tokens):
                tokens.prefetch(drawn.sample[drawn.source == source])

    def validation(self) -> Iterator[tuple[int, Batch]]:
        """Yield this rank's part of the first held-out sequences of each source; the same ones every time."""
        train = self.task.train
        for source, tokens in enumerate(self.held_out.tokens):
            count = min(train.validate_sequences, tokens.num_samples)
            samples = np.array([i * tokens.num_samples // count for i in range(count)])
            chunks = [samples[i : i + train.micro_batch] for i in range(0, count, train.micro_batch)]
            for chunk in slots_of_rank(len(chunks), self.member.world_size, self.member.rank):
                same = np.full(len(chunks[chunk]), source)
                yield source, self.batch(self.held_out, Drawn(same, chunks[chunk], np.zeros_like(same)))

    def batch(self, part: Part, drawn: Drawn) -> Batch:
        """Return what is learned from samples, in their order."""
        tokens = np.empty((len(drawn.sample), self.task.train.seq_len + 1), np.int64)
        documents = np.empty_like(tokens) if self.task.data.masks_documents else None
        counts = np.empty(tokens.shape, bool) if self.task.data.chats else None
        for source in np.unique(drawn.source).tolist():
            rows = drawn.source == source
            tokens[rows] = part.tokens[source].batch(drawn.sample[rows])
            if documents is not None:
                documents[rows] = part.documents(source, drawn.sample[rows])
            if counts is not None:
                counts[rows] = part.counts(source, drawn.sample[rows])
        return batch_of(
            torch.from_numpy(tokens),
            None if counts is None else torch.from_numpy(counts),
            None if documents is None else torch.from_numpy(documents).int(),
        )

    def waited(self) -> float:
        """Return for how many seconds this rank has waited for tokens since it was asked last."""
        before, self._waited = self._waited, sum(tokens.wait_s for tokens in self.train.tokens)
        return self._waited - before

    def figures(self, step: int) -> dict[str, float]:
        """Return how many tokens of each named source, and how often all of it, a run has read after a step."""
        if self.sources == [""]:
            return {}
        drawn, found = self.order.drawn(self.recipe.samples_before(step + 1)), {}
        for name, tokens, samples in zip(self.sources, self.train.tokens, drawn.tolist(), strict=True):
            found[f"data/{name}/tokens"] = samples * tokens.tokens_per_sample
            found[f"data/{name}/epochs"] = samples / tokens.num_samples
        return found

    def trained(self, step: int, slot: Slot) -> None:
        """Write down that a slot was trained on."""
        if slot.counts:
            self.ledger.add(step, slot.number, slot.drawn)

    def close(self) -> None:
        """End what reads ahead."""
        self.train.close()
        self.held_out.close()


def counted(slots: Iterable[Slot]) -> int:
    """Return how many of their targets count."""
    return sum(slot.batch.counted for slot in slots)


class _Ledger:
    """Writes down which samples this process trained on, one line a slot, for whoever wants proof."""

    def __init__(self, task: Task, member: Place) -> None:
        self.file = None
        self.place = {"attempt": task.attempt, "generation": member.generation}
        self.names = [corpus.name for corpus in task.corpora]
        if task.data.ledger:
            folder = Path(task.data.ledger)
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{task.attempt:04d}-{member.generation:04d}-{member.rank:05d}.jsonl"
            self.file = (folder / name).open("a", buffering=1)

    def add(self, step: int, slot: int, drawn: Drawn) -> None:
        if self.file:
            line = {**self.place, "step": step, "slot": slot, "samples": drawn.sample.tolist()}
            if self.names != [""]:
                line["sources"] = [self.names[source] for source in drawn.source]
            self.file.write(json.dumps(line) + "\n")
