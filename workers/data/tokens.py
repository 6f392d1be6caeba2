"""Reading samples out of prepared token shards.

A sample is `seq_len + 1` tokens: inputs and, one to the right, targets. Sample i of a text starts at token
`i * seq_len` of the split, whichever shard that lies in; one of conversations has some, whole (`conversations.py`).

Beside a shard lies the SHA-256 of each of its blocks, and the index has that of this list. So a corpus of any size is
open at once, and no token is given out whose block was not compared with its hash in this process. Shards on a disk are
memory-mapped; of those in an object store, blocks come through a cache that the processes of a node share. Shards of
older versions have no such lists: they are compared as a whole when they are opened, remote ones are copied before.
"""

import hashlib
import os
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from workers.common.errors import NotFoundError, StorageError
from workers.common.storage import Store, is_remote, storage_errors
from workers.data.cache import BlockCache, node_cache
from workers.data.corpus import REMAKE, Corpus, Shard, num_samples

BLOCK = 1 << 20
"""Bytes of a shard that have a hash of their own."""
HASH = 32
"""Bytes of it."""
REGION = 16
"""Blocks of which one request asks for neighbours, and which one process of a node fetches at a time."""
READS_AT_ONCE = 4
AHEAD = 256
"""Blocks that are on their way at most."""
MAPPED = 1024
"""Shards of a process: the kernel's limit is 65,530."""


class TokenSplit:
    """One split of a corpus as an array of samples. Not for several threads.

    Args:
        corpus: the prepared corpus.
        shards: its `train` or `validation` shards.
        seq_len: tokens per sample, without the one more for the last target.
        cache_gb: of this node's disk, for all that is read from remote shards.

    Raises:
        StorageError: a shard of an older version is damaged or missing.
    """

    def __init__(self, corpus: Corpus, shards: Sequence[Shard], seq_len: int, cache_gb: float = 10.0) -> None:
        self.seq_len = seq_len
        self.num_samples = num_samples(tuple(shards), seq_len)
        self.tokens_per_sample = float(seq_len)
        """That are learned from, on average, but for those that do not count."""
        self.wait_s = 0.0
        """How long batches have waited for blocks."""
        self.bytes_read = 0
        """From where the shards are; what other processes have left in the cache does not count."""
        self._dtype = np.dtype(corpus.dtype).newbyteorder("<")
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._ahead = AHEAD
        remote, store, cache = is_remote(corpus.url), corpus.store, node_cache(cache_gb)
        mapped = lru_cache(MAPPED)(_mapped)
        self._shards: list[_Blocks] = []
        for shard in shards:
            size = shard.tokens * self._dtype.itemsize
            if not shard.sums:
                path = _whole(store, shard, size) if remote else Path(corpus.url, shard.name)
                self._shards.append(_Local(store, shard, size, path, mapped, self._count))
            elif remote:
                self._shards.append(_Remote(store, shard, size, cache, self._count))
                self._ahead = max(1, min(AHEAD, cache.limit // BLOCK // 2))
            else:
                self._shards.append(_Local(store, shard, size, Path(corpus.url, shard.name), mapped, self._count))
        self._lock = threading.Lock()
        self._coming: dict[tuple[int, int], Future[object]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def sample(self, index: int) -> np.ndarray:
        """Return the `seq_len + 1` tokens of one sample as int64."""
        return self.batch([index])[0]

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return `[len(indices), seq_len + 1]` tokens, and wait for no more than is missing of them.

        Raises:
            StorageError: a block is damaged or missing, or the store does not answer.
        """
        self.prefetch(indices)
        tokens = np.zeros((len(indices), self.seq_len + 1), np.int64)
        for row, index in zip(tokens, indices, strict=True):
            at = 0
            for number, begin, end in self._spans(int(index)):
                part = np.frombuffer(self._read(number, begin, end), self._dtype)
                row[at : at + len(part)] = part
                at += len(part)
        return tokens

    def prefetch(self, indices: Iterable[int] | np.ndarray) -> None:
        """Begin to read what is missing of samples that will be wanted; what goes wrong is told when they are."""
        missing: dict[int, set[int]] = {}
        for index in indices:
            for number, begin, end in self._spans(int(index)):
                for block in _blocks(begin, end):
                    if not self._shards[number].has(block):
                        missing.setdefault(number, set()).add(block)
        for number, blocks in missing.items():
            with self._lock:
                blocks = sorted(block for block in blocks if (number, block) not in self._coming)
            for run in _runs(blocks):
                if len(self._coming) + len(run) > max(self._ahead, len(run)):
                    return
                self._begin(number, run)

    def close(self) -> None:
        """Let the threads end, each as soon as the store has answered it."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, number: int, run: range) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="tokens")
        keys = [(number, block) for block in run]
        future = self._pool.submit(self._shards[number].load, run)
        with self._lock:
            self._coming.update(dict.fromkeys(keys, future))

        def arrived(_: object) -> None:
            with self._lock:
                for key in keys:
                    self._coming.pop(key, None)

        future.add_done_callback(arrived)

    def _read(self, number: int, begin: int, end: int) -> bytes | memoryview:
        shard, blocks = self._shards[number], _blocks(begin, end)
        if all(shard.has(block) for block in blocks):
            return shard.read(begin, end)
        began = time.monotonic()
        with self._lock:
            coming = [self._coming[number, block] for block in blocks if (number, block) in self._coming]
        wait(coming)
        try:
            return shard.read(begin, end)  # What did not arrive is tried again here, and its error is raised.
        finally:
            self.wait_s += time.monotonic() - began

    def ranges(self, index: int) -> list[tuple[int, int]]:
        """Return which tokens of the split a sample has, in its order: the first of each stretch, and its end."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"there is no sample {index}: the split has {self.num_samples}")
        return [(index * self.seq_len, (index + 1) * self.seq_len + 1)]

    def _spans(self, index: int) -> Iterator[tuple[int, int, int]]:
        """Yield the shard, the first byte and the end of each part of a sample."""
        for start, stop in self.ranges(index):
            yield from self._parts(start, stop)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        width = self._dtype.itemsize
        number = bisect_right(self._ends, start)
        while start < stop:
            base = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            if end > start:
                yield number, (start - base) * width, (end - base) * width
            start, number = end, number + 1

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size


class _Blocks(Protocol):
    """A shard."""

    def has(self, block: int) -> bool:
        """Tell whether a block has been compared with its hash, and is here."""
        ...

    def load(self, run: range) -> object:
        """Bring blocks here, and compare them; called from several threads."""
        ...

    def read(self, begin: int, end: int) -> bytes | memoryview:
        """Return bytes of blocks that are all compared, be it now."""
        ...


class _Sums:
    """What all shards have: a place, a size, and the hashes of the blocks."""

    def __init__(self, store: Store, shard: Shard, size: int, count: Callable[[int], None]) -> None:
        self.store, self.shard, self.size, self.count = store, shard, size, count
        self.where = f"{store.url}/{shard.name}"
        self.checked = bytearray(-(-size // BLOCK))

    @cached_property
    def sums(self) -> bytes:
        """The hashes of the blocks."""
        return self.verified(_read(self.store, self.name_of_sums))

    @property
    def name_of_sums(self) -> str:
        return self.shard.name.removesuffix(".bin") + ".sums"

    def verified(self, sums: bytes) -> bytes:
        if hashlib.sha256(sums).hexdigest() != self.shard.sums or len(sums) != HASH * len(self.checked):
            raise StorageError(
                f"{self.store.url}/{self.name_of_sums}: damaged (its SHA-256 is not the index's); delete it. {REMAKE}"
            )
        return sums

    def is_block(self, block: int, data: bytes | memoryview) -> bool:
        return hashlib.sha256(data).digest() == self.sums[HASH * block : HASH * (block + 1)]

    def damaged(self, block: int) -> StorageError:
        return StorageError(
            f"{self.where}: damaged (the SHA-256 of its MiB {block} is not that in {self.name_of_sums}); delete it. "
            f"{REMAKE}"
        )


class _Local(_Sums):
    """A shard on a disk."""

    def __init__(
        self,
        store: Store,
        shard: Shard,
        size: int,
        path: Path,
        mapped: Callable[[Path, str, int], memoryview],
        count: Callable[[int], None],
    ) -> None:
        super().__init__(store, shard, size, count)
        self.path, self._mapped = path, mapped
        if not shard.sums:
            _compare(self.bytes, shard, self.where)
            self.checked = bytearray(b"\1" * len(self.checked))

    @property
    def bytes(self) -> memoryview:
        """All of it."""
        return self._mapped(self.path, self.where, self.size)

    def has(self, block: int) -> bool:
        return bool(self.checked[block])

    def load(self, run: range) -> None:
        content = self.bytes
        for block in run:
            if not self.checked[block]:
                data = content[block * BLOCK : (block + 1) * BLOCK]
                self.count(len(data))
                if not self.is_block(block, data):
                    raise self.damaged(block)
                self.checked[block] = 1

    def read(self, begin: int, end: int) -> memoryview:
        self.load(_blocks(begin, end))
        return self.bytes[begin:end]


class _Remote(_Sums):
    """A shard in a store, behind the node's cache."""

    def __init__(self, store: Store, shard: Shard, size: int, cache: BlockCache, count: Callable[[int], None]) -> None:
        super().__init__(store, shard, size, count)
        self.cache = cache

    @cached_property
    def sums(self) -> bytes:
        """The hashes of the blocks."""
        name = f"{self.shard.sha256}/sums"
        with suppress(StorageError):
            return self.verified(self.cache.read(name) or b"")
        sums = self.verified(_read(self.store, self.name_of_sums))
        self.cache.put(name, sums)
        return sums

    def has(self, block: int) -> bool:
        return bool(self.checked[block]) and self.cache.has(self._name(block))

    def load(self, run: range) -> dict[int, bytes]:
        """Return the blocks, too: a small cache may not have them any more when they are wanted."""
        found = self._cached(run)
        if len(found) < len(run):
            with self.cache.turn(f"{self.shard.sha256} {run.start // REGION}"):
                found |= self._cached(block for block in run if block not in found)
                for missing in _runs([block for block in run if block not in found]):
                    found |= self._fetch(missing)
        return found

    def read(self, begin: int, end: int) -> bytes:
        parts = []
        for block in _blocks(begin, end):
            start, stop = max(0, begin - block * BLOCK), min(BLOCK, end - block * BLOCK)
            part = self.cache.read(self._name(block), start, stop) if self.checked[block] else None
            if part is None or len(part) < stop - start:
                part = self.load(range(block, block + 1))[block][start:stop]
            parts.append(part)
        return b"".join(parts)

    def _name(self, block: int) -> str:
        return f"{self.shard.sha256}/{block:08d}"

    def _cached(self, blocks: Iterable[int]) -> dict[int, bytes]:
        found = {}
        for block in blocks:
            data = self.cache.read(self._name(block))
            if data is not None and self.is_block(block, data):
                found[block], self.checked[block] = data, 1
        return found

    def _fetch(self, run: range) -> dict[int, bytes]:
        try:
            data = self.store.read_range(self.shard.name, run.start * BLOCK, min(run.stop * BLOCK, self.size))
        except NotFoundError as error:
            raise StorageError(f"{self.where}: missing; {REMAKE}") from error
        self.count(len(data))
        found = {}
        for block in run:
            begin = (block - run.start) * BLOCK
            found[block] = data[begin : begin + BLOCK]
            if not self.is_block(block, found[block]):
                raise self.damaged(block)
            self.cache.put(self._name(block), found[block])
            self.checked[block] = 1
        return found


def _blocks(begin: int, end: int) -> range:
    """Return the blocks in which bytes lie."""
    return range(begin // BLOCK, -(-end // BLOCK))


def _runs(blocks: Sequence[int]) -> Iterator[range]:
    """Join neighbours, none over the border of a region."""
    start = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1 or blocks[i] % REGION == 0:
            yield range(blocks[start], blocks[i - 1] + 1)
            start = i


def _whole(store: Store, shard: Shard, size: int) -> Path:
    """Return this node's copy of a remote shard of an older version."""
    # The name is the content's, so that corpora and runs can share it.
    cache = Store(f"{tempfile.gettempdir()}/raymuon-tokens-{os.getuid()}")
    path, where = Path(cache.url, shard.sha256), f"{store.url}/{shard.name}"
    try:
        _compare(_mapped(path, where, size), shard, where)
    except StorageError:  # There is none, or a damaged one.
        cache.put(shard.sha256, _read(store, shard.name))
    return path


def _read(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except NotFoundError as error:
        raise StorageError(f"{store.url}/{name}: missing; {REMAKE}") from error


def _mapped(path: Path, where: str, size: int) -> memoryview:
    try:
        with storage_errors(where):
            found = path.stat().st_size
            content = np.memmap(path, np.uint8, "r").data if found else memoryview(b"")
    except NotFoundError as error:
        raise StorageError(f"{where}: missing; {REMAKE}") from error
    if found != size:
        raise StorageError(f"{where}: damaged ({found:,} bytes, by the index {size:,}); delete it. {REMAKE}")
    return content


def _compare(content: memoryview, shard: Shard, where: str) -> None:
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise StorageError(f"{where}: damaged (its SHA-256 is not the index's); delete it. {REMAKE}")
