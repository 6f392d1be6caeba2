"""Whole conversations become sequences: each lies in one, none is cut, and little of a sequence is empty.

Best-fit decreasing (Johnson et al., 1974): from the longest on, each goes where the least room is left after it. That
depends on the lengths alone, so it is an index that every process makes for itself of where documents end, and nothing
that is kept: the same tokens serve any length of a sequence. Each shard is packed by itself, so that what is read
together lies together, and what is held while it is packed does not grow with the source.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from workers.data.corpus import Corpus, Shard, num_samples
from workers.data.ends import DocumentEnds

PACKING = "best-fit-decreasing-1"
"""Names what it does: a run goes on with no other."""
LEFT_OUT = -1


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return for each document the number of its sequence, from 0 without gaps; LEFT_OUT where it is too long for any.

    Args:
        lengths: in tokens, from 1.
        capacity: of a sequence.
    """
    found = np.full(len(lengths), LEFT_OUT, np.int64)
    fitting = np.flatnonzero(lengths <= capacity)
    order = fitting[np.argsort(-lengths[fitting], kind="stable")]
    open_, rooms, count = {}, 0, 0  # Sequences by the room in them; the bits of `rooms` say which rooms there are.
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if large := rooms >> length:
            room = length + (large & -large).bit_length() - 1
            sequence = open_[room].pop()
            if not open_[room]:
                rooms ^= 1 << room
        else:
            room, sequence, count = capacity, count, count + 1
        found[document] = sequence
        if left := room - length:
            open_.setdefault(left, []).append(sequence)
            rooms |= 1 << left
    return found


@dataclass(frozen=True)
class _Packed:
    """A shard's documents, sequence by sequence, and within one in the order of the shard."""

    starts: np.ndarray
    """First token in the split."""
    lengths: np.ndarray
    firsts: np.ndarray
    """The first document of each sequence, and one more."""


class Packing:
    """The sequences of a split of conversations.

    Args:
        shards: of each, the length of every document in tokens.
        capacity: tokens of a sequence, with the last target.
    """

    def __init__(self, shards: Iterable[np.ndarray], capacity: int) -> None:
        self.capacity, self.num_documents, self.num_tokens = capacity, 0, 0
        self.too_long, self.longest = 0, 0
        self._packed: list[_Packed] = []
        base = 0
        for lengths in shards:
            self._packed.append(self._pack(lengths, base))
            base += int(lengths.sum())
        self._firsts = [0, *accumulate(len(one.firsts) - 1 for one in self._packed)]

    @property
    def num_samples(self) -> int:
        """How many sequences there are."""
        return self._firsts[-1]

    def documents(self, sample: int) -> list[tuple[int, int]]:
        """Return the documents of a sequence: the first token of each in the split, and the one after its last."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"there is no sample {sample}: the split has {self.num_samples}")
        number = bisect_right(self._firsts, sample) - 1
        packed = self._packed[number]
        first, last = packed.firsts[sample - self._firsts[number] :][:2].tolist()
        starts, lengths = packed.starts[first:last].tolist(), packed.lengths[first:last].tolist()
        return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]

    def _pack(self, lengths: np.ndarray, base: int) -> _Packed:
        starts, sequences = base + np.cumsum(lengths) - lengths, best_fit(lengths, self.capacity)
        fits = sequences != LEFT_OUT
        order = np.argsort(sequences, kind="stable")[int((~fits).sum()) :]
        counts = np.bincount(sequences[fits])
        self.num_documents += len(order)
        self.num_tokens += int(lengths[fits].sum())
        self.too_long += int((~fits).sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        return _Packed(starts[order], lengths[order].astype(np.int32), np.concatenate([[0], np.cumsum(counts)]))


@lru_cache(maxsize=16)
def packing_of(corpus: Corpus, shards: tuple[Shard, ...], seq_len: int) -> Packing:
    """Return the sequences of a split of conversations; made once in a process.

    Raises:
        StorageError: it cannot be read where documents end.
    """
    ends = DocumentEnds(corpus, shards)
    return Packing((ends.lengths(number) for number in range(len(shards))), seq_len + 1)


def samples_in(corpus: Corpus, shards: tuple[Shard, ...], seq_len: int) -> int:
    """Return how many samples a split of any source has."""
    if corpus.chat_template:
        return packing_of(corpus, shards, seq_len).num_samples
    return num_samples(shards, seq_len)
