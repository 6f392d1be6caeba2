"""Reading samples out of prepared token shards.

A sample is `seq_len + 1` tokens: inputs and, one to the right, targets. Sample i starts at token `i * seq_len` of the
split, whichever shard that lies in. Shards are memory-mapped; remote ones are copied to a local cache first.
"""

import hashlib
import os
import tempfile
from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from workers.common.errors import NotFoundError, StorageError
from workers.common.storage import Store, is_remote, storage_errors
from workers.data.corpus import REMAKE, Corpus, Shard


class TokenSplit:
    """One split of a corpus as an array of samples.

    Args:
        corpus: the prepared corpus.
        shards: its `train` or `validation` shards.
        seq_len: tokens per sample, without the one more for the last target.
    """

    def __init__(self, corpus: Corpus, shards: tuple[Shard, ...], seq_len: int) -> None:
        self.seq_len = seq_len
        self.num_samples = max(0, (Corpus.tokens(shards) - 1) // seq_len)
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._maps = [_open(corpus.store, shard) for shard in shards]

    def sample(self, index: int) -> np.ndarray:
        """Return the `seq_len + 1` tokens of one sample as int64."""
        start, stop = index * self.seq_len, (index + 1) * self.seq_len + 1
        parts = []
        while start < stop:
            shard = bisect_right(self._ends, start)
            base = self._ends[shard] - len(self._maps[shard])
            part = self._maps[shard][start - base : stop - base]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts).astype(np.int64)

    def batch(self, indices: list[int]) -> np.ndarray:
        """Return `[len(indices), seq_len + 1]` tokens."""
        return np.stack([self.sample(index) for index in indices])


def _open(store: Store, shard: Shard) -> np.ndarray:
    """Map a shard and check its hash, so that no run trains on damaged data."""
    url = store.url
    if not is_remote(url):
        return _mapped(Path(url, shard.name), shard, url)
    # Copied once per node; the name is the content's, so that corpora and runs can share it.
    cache = Store(f"{tempfile.gettempdir()}/raymuon-tokens-{os.getuid()}")
    path = Path(cache.url, shard.sha256)
    with suppress(StorageError):
        return _mapped(path, shard, url)
    cache.put(shard.sha256, _read(store, shard))  # There is none, or a damaged one.
    return _mapped(path, shard, url)


def _read(store: Store, shard: Shard) -> bytes:
    try:
        return store.read(shard.name)
    except NotFoundError as error:
        raise StorageError(f"{store.url}/{shard.name}: missing; {REMAKE}") from error


def _mapped(path: Path, shard: Shard, url: str) -> np.ndarray:
    try:
        with storage_errors(f"{url}/{shard.name}"):
            tokens = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    except NotFoundError as error:
        raise StorageError(f"{url}/{shard.name}: missing; {REMAKE}") from error
    if hashlib.sha256(tokens.data).hexdigest() != shard.sha256:
        raise StorageError(f"{url}/{shard.name}: damaged (its SHA-256 is not the index's); delete it. {REMAKE}")
    return tokens
