"""Where documents end among the tokens of a split, and which file and row each came from.

Beside each shard lies `train-00000.ends`, a table of three little-endian uint64 for each document in it: the offset of
the token after its last one within the shard, the number of its piece in the index's list, and its row there (0: the
whole file). No document goes on in another shard. A table is read whole when something in its shard is asked for.
"""

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

from workers.common.errors import StorageError
from workers.data.corpus import REMAKE, Corpus, Shard, read_index

TABLES_KEPT = 64
"""Of shards, in memory: some megabytes each."""


@dataclass(frozen=True)
class Stretch:
    """A document's part of a range of tokens."""

    start: int
    """The first token of the document in the split; it may lie before the range."""
    stop: int
    """The token after its last one; it may lie after the range."""
    file: str
    row: int
    """From 1; 0: the whole file."""


class DocumentEnds:
    """The documents of one split.

    Args:
        corpus: the prepared source.
        shards: its `train` or `validation` shards.
    """

    def __init__(self, corpus: Corpus, shards: tuple[Shard, ...]) -> None:
        self.corpus, self.shards = corpus, shards
        self._firsts = [0, *accumulate(shard.tokens for shard in shards)]
        self._table = lru_cache(TABLES_KEPT)(self._read)

    def of_sample(self, sample: int, seq_len: int) -> np.ndarray:
        """Return for each of the `seq_len + 1` tokens of a sample the number of its document in it: int64, from 0."""
        return self.numbers(sample * seq_len, (sample + 1) * seq_len + 1)

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """Return for each token of a range how many documents have ended before it in the range: int64, from 0."""
        parts, ended = [], 0
        for shard, first, last in self._parts(start, stop):
            ends = self._table(shard)[:, 0]
            found = np.searchsorted(ends, np.arange(first, last), side="right")
            parts.append(found - found[0] + ended)
            ended = int(parts[-1][-1]) + (last == self.shards[shard].tokens)
        return np.concatenate(parts)

    def lengths(self, shard: int) -> np.ndarray:
        """Return how many tokens each document of a shard has."""
        return np.diff(self._table(shard)[:, 0], prepend=0)

    def stretches(self, start: int, stop: int) -> list[Stretch]:
        """Return the documents that have tokens in a range, in order."""
        found = []
        for shard, first, last in self._parts(start, stop):
            table, base = self._table(shard), self._firsts[shard]
            ends = table[:, 0]
            numbers = np.searchsorted(ends, [first, last - 1], side="right").tolist()
            for number in range(numbers[0], numbers[1] + 1):
                begin = int(ends[number - 1]) if number else 0
                file = self._pieces[int(table[number, 1])]
                found.append(Stretch(base + begin, base + int(ends[number]), file, int(table[number, 2])))
        return found

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Cut a range into shards: the number of each, and the part of it."""
        parts = []
        while start < stop:
            shard = bisect_right(self._firsts, start) - 1
            base, end = self._firsts[shard], self._firsts[shard + 1]
            parts.append((shard, start - base, min(stop, end) - base))
            start = min(stop, end)
        return parts

    @cached_property
    def _pieces(self) -> list[str]:
        """What each piece is called: its file, and where it begins in it, where it is not the first part."""
        pieces = read_index(self.corpus.store).get("pieces", [])
        return [f"{url}@{start}" if start else url for url, _, start, *_ in pieces]

    def _read(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        name = f"{self.corpus.url}/{shard.beside('ends')}"
        if not shard.ends:
            raise StorageError(
                f"{name}: tokens that were prepared by an older raymuon have no ends of documents beside them; delete "
                f"{self.corpus.url}. {REMAKE}"
            )
        table = self.corpus.store.read(shard.beside("ends"))
        if hashlib.sha256(table).hexdigest() != shard.ends:
            raise StorageError(f"{name}: damaged (its SHA-256 is not the index's); delete {self.corpus.url}. {REMAKE}")
        return np.frombuffer(table, "<u8").reshape(-1, 3).astype(np.int64)
