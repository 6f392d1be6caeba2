"""Writing and reading the tensors of a checkpoint, in numpy: the command line reads checkpoints without torch."""

import hashlib
import json
import secrets
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod

import numpy as np

from optim.layout import Fragment, copies
from workers.checkpoint.manifest import CHUNK, SHARDS, Manifest, ShardFile, TensorSlice
from workers.common.errors import DamagedError, NotFoundError, StorageError
from workers.common.storage import Store
from workers.common.uploads import Bandwidth, upload

READ_CHUNKS = 16
"""Chunks that are asked for in one request."""
READS_AT_ONCE = 4
RECENT = 16
"""Chunks that are remembered."""


def write_shard(
    store: Store,
    place: str,
    rank: int,
    tensors: Mapping[TensorSlice, np.ndarray],
    bandwidth: Bandwidth | None = None,
) -> ShardFile:
    """Write one rank's part as a safetensors file, under a name that nobody else will ever use.

    The tensors are not copied: they must not change meanwhile.

    Args:
        store: the run's folder.
        place: of the checkpoint (`place_of`).
        rank: whose part it is.
        tensors: contiguous flat fp32 arrays.
        bandwidth: a limit.
    """
    path = f"{SHARDS}/{place}/{rank:05d}-{secrets.token_hex(6)}.safetensors"
    content = _Safetensors(tensors)
    upload(store, path, content, bandwidth or Bandwidth(None))
    return ShardFile(path, content.size, content.header, content.chunks, tuple(tensors))


class _Safetensors:
    """The bytes of a safetensors file out of arrays that stay where they are; hashes what is read, chunk by chunk."""

    def __init__(self, tensors: Mapping[TensorSlice, np.ndarray]) -> None:
        ends = list(accumulate(array.nbytes for array in tensors.values()))
        about = {
            entry.key: {"dtype": "F32", "shape": [array.size], "data_offsets": [end - array.nbytes, end]}
            for (entry, array), end in zip(tensors.items(), ends, strict=True)
        }
        text = json.dumps(about, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        self.header = len(head)
        self.size = self.header + (ends[-1] if ends else 0)
        self._pieces = [memoryview(head), *(array.data.cast("B") for array in tensors.values())]
        self._starts = [
            0,
            *(self.header + end - array.nbytes for array, end in zip(tensors.values(), ends, strict=True)),
        ]
        self._hashes: dict[int, str] = {}

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start`, a multiple of CHUNK, up to `stop`."""
        found, at = bytearray(), start
        index = bisect_right(self._starts, start) - 1
        while at < stop:
            piece, begin = self._pieces[index], self._starts[index]
            taken = piece[at - begin : stop - begin]
            found += taken
            at, index = at + len(taken), index + 1
        data = bytes(found)
        for offset in range(0, len(data), CHUNK):
            chunk = memoryview(data)[offset : offset + CHUNK]
            self._hashes[(start + offset) // CHUNK] = hashlib.sha256(chunk).hexdigest()
        return data

    @property
    def chunks(self) -> tuple[str, ...]:
        """The hashes of all chunks; all have been read."""
        return tuple(self._hashes[number] for number in range(-(-self.size // CHUNK)))


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes `begin` to `end` of a shard, wanted at `target` of what is being filled."""

    begin: int
    end: int
    target: int

    @property
    def chunks(self) -> range:
        return range(self.begin // CHUNK, -(-self.end // CHUNK))


class CheckpointReader:
    """Reads intervals of tensors out of a checkpoint's shards: of each file only the chunks in which they lie.

    Every chunk is verified by its hash before anything of it is used.

    Args:
        store: where the run is.
        manifest: of the checkpoint.
        progress: called after every read, in whatever thread made it.
    """

    def __init__(self, store: Store, manifest: Manifest, progress: Callable[[], None] = lambda: None) -> None:
        self.store, self.manifest, self.progress = store, manifest, progress
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._recent: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._have: dict[str, list[tuple[int, Fragment]]] = {}
        self._sources: list[tuple[ShardFile, int]] = []
        for shard in manifest.shards:
            for entry, offset in zip(shard.entries, shard.offsets, strict=True):
                fragment = Fragment(entry.name, entry.start, entry.length, offset=0)
                self._have.setdefault(entry.kind, []).append((len(self._sources), fragment))
                self._sources.append((shard, offset))

    @property
    def kinds(self) -> list[str]:
        """The kinds of state that the checkpoint holds."""
        return list(self._have)

    def names(self, kind: str) -> list[str]:
        """Return the names of the tensors of a kind."""
        return list(dict.fromkeys(fragment.name for _, fragment in self._have.get(kind, [])))

    def fill(self, kind: str, want: Iterable[Fragment], target: np.ndarray) -> None:
        """Fill the wanted fragments of the flat fp32 `target`.

        Raises:
            DamagedError: a shard is damaged or missing.
            StorageError: an interval is in no shard, or storage does not answer.
        """
        plan, missing = copies(self._have.get(kind, []), want)
        if missing:
            raise StorageError(f"{self.store.url}: checkpoint of step {self.manifest.step}: no {kind} of {missing[0]}")
        wanted: dict[str, tuple[ShardFile, list[_Span]]] = {}
        for copy in plan:
            shard, offset = self._sources[copy.source]
            begin = offset + 4 * copy.source_offset
            span = _Span(begin, begin + 4 * copy.length, 4 * copy.target_offset)
            wanted.setdefault(shard.path, (shard, []))[1].append(span)
        for shard, spans in wanted.values():
            self._fetch(shard, spans, target.data.cast("B"))

    def tensor(self, kind: str, name: str) -> np.ndarray:
        """Return a whole tensor in its shape."""
        shape = self.manifest.shapes[name]
        flat = np.empty(prod(shape), dtype=np.float32)
        self.fill(kind, [Fragment(name, 0, flat.size, 0)], flat)
        return flat.reshape(shape)

    def verify(self) -> Iterator[str]:
        """Read every shard as a whole, and yield what is wrong with each that is damaged."""
        for shard in self.manifest.shards:
            try:
                with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="read") as threads:
                    for _ in threads.map(partial(self._read, shard), _runs([*range(len(shard.chunks))])):
                        pass
            except DamagedError as error:
                yield str(error)

    def _fetch(self, shard: ShardFile, spans: list[_Span], target: memoryview) -> None:
        """Read the chunks in which the spans lie, several runs of them at once, and put the spans in place."""

        def scatter(begin: int, data: bytes) -> None:
            for span in spans:
                low, high = max(span.begin, begin), min(span.end, begin + len(data))
                if low < high:
                    at = span.target - span.begin
                    target[at + low : at + high] = memoryview(data)[low - begin : high - begin]

        def read(run: range) -> None:
            scatter(run[0] * CHUNK, self._read(shard, run))

        numbers = {number for span in spans for number in span.chunks}
        for number in sorted(numbers):
            if (known := self._recent.get((shard.path, number))) is not None:
                scatter(number * CHUNK, known)
                numbers.remove(number)
        with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="read") as threads:
            list(threads.map(read, _runs(sorted(numbers))))

    def _read(self, shard: ShardFile, run: range) -> bytes:
        """Return the bytes of a run of chunks, verified."""
        where = f"{self.store.url}/{shard.path}"
        try:
            data = self.store.read_range(shard.path, run.start * CHUNK, min(run.stop * CHUNK, shard.size))
        except NotFoundError as error:
            raise DamagedError(f"{where}: missing") from error
        for number in run:
            begin = (number - run.start) * CHUNK
            if hashlib.sha256(memoryview(data)[begin : begin + CHUNK]).hexdigest() != shard.chunks[number]:
                raise DamagedError(f"{where}: damaged (the SHA-256 of its MiB {number} is not the manifest's)")
        with self._lock:
            self.bytes_read += len(data)
            for number in {run[0], run[-1]}:  # The next interval often begins where this one ends.
                begin = (number - run.start) * CHUNK
                self._recent[shard.path, number] = data[begin : begin + CHUNK]
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        self.progress()
        return data


def _runs(numbers: list[int]) -> Iterator[range]:
    """Join neighbours into runs of at most READ_CHUNKS."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1 or i - start == READ_CHUNKS:
            yield range(numbers[start], numbers[i - 1] + 1)
            start = i
