"""Sequences of whole conversations out of prepared token shards: their tokens, and which of these are learned.

A sequence has several conversations one after the other, and behind the last one zeros that are nobody's and do not
count. Beside each shard lies a bit for each of its tokens, the lowest of a byte first: whether the assistant has said
it.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from workers.common.documents import NOBODY
from workers.common.errors import StorageError
from workers.data.corpus import REMAKE, Corpus, Shard
from workers.data.packing import packing_of
from workers.data.tokens import TokenSplit

BITS_KEPT = 16
"""Of shards, in memory: a megabyte or more each."""


class PackedSplit(TokenSplit):
    """One split of conversations as an array of samples. Not for several threads.

    Args:
        corpus: the prepared conversations.
        shards: its `train` or `validation` shards.
        seq_len: tokens per sample, without the one more for the last target.
        cache_gb: of this node's disk, for all that is read from remote shards.
    """

    def __init__(self, corpus: Corpus, shards: tuple[Shard, ...], seq_len: int, cache_gb: float = 10.0) -> None:
        super().__init__(corpus, shards, seq_len, cache_gb)
        self.packing = packing_of(corpus, shards, seq_len)
        self.num_samples = self.packing.num_samples
        self.tokens_per_sample = self.packing.num_tokens / max(1, self.num_samples)
        self._corpus, self._files = corpus, shards
        self._bases = [0, *accumulate(shard.tokens for shard in shards)]
        self._bits = lru_cache(BITS_KEPT)(self._read_bits)

    def ranges(self, index: int) -> list[tuple[int, int]]:
        """Return the conversations of a sample: the first token of each in the split, and the one after its last."""
        return self.packing.documents(index)

    def documents(self, index: int) -> np.ndarray:
        """Return the number of each token's conversation in its sample, `[seq_len + 1]`; NOBODY's fill it up."""
        lengths = [stop - start for start, stop in self.ranges(index)]
        filled = self.seq_len + 1 - sum(lengths)
        return np.repeat([*range(len(lengths)), NOBODY], [*lengths, filled])

    def counts(self, index: int) -> np.ndarray:
        """Return which tokens of a sample are learned, bool `[seq_len + 1]`."""
        found, at = np.zeros(self.seq_len + 1, bool), 0
        for start, stop in self.ranges(index):
            found[at : at + stop - start] = self._counts(start, stop)
            at += stop - start
        return found

    def _counts(self, start: int, stop: int) -> np.ndarray:
        shard = bisect_right(self._bases, start) - 1
        first, last = start - self._bases[shard], stop - self._bases[shard]
        bits = np.unpackbits(self._bits(shard)[first // 8 : -(-last // 8)], bitorder="little")
        return bits[first % 8 :][: last - first].astype(bool)

    def _read_bits(self, number: int) -> np.ndarray:
        shard, store = self._files[number], self._corpus.store
        bits = store.read(shard.beside("counts"))
        if hashlib.sha256(bits).hexdigest() != shard.counts:
            raise StorageError(
                f"{store.url}/{shard.beside('counts')}: damaged (its SHA-256 is not the index's); delete {store.url}. "
                f"{REMAKE}"
            )
        return np.frombuffer(bits, np.uint8)


def split_of(corpus: Corpus, shards: Sequence[Shard], seq_len: int, cache_gb: float = 10.0) -> TokenSplit:
    """Return a split of any source as samples."""
    kind = PackedSplit if corpus.chat_template else TokenSplit
    return kind(corpus, tuple(shards), seq_len, cache_gb)
