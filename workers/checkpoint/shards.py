"""Writing and reading the tensors of a checkpoint, in numpy: the command line reads checkpoints without torch."""

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import prod

import numpy as np
import safetensors.numpy

from optim.layout import Fragment, copies
from workers.checkpoint.manifest import Entry, Manifest, ShardFile
from workers.errors import StorageError
from workers.storage import Store


def write_shard(store: Store, prefix: str, tensors: Mapping[Entry, np.ndarray]) -> ShardFile:
    """Write one rank's part under a name that nobody else will ever use.

    Args:
        store: the run's folder.
        prefix: of the file's name, for people.
        tensors: flat fp32 arrays.
    """
    data = safetensors.numpy.save({entry.key: np.ascontiguousarray(array) for entry, array in tensors.items()})
    path = f"shards/{prefix}-{secrets.token_hex(6)}.safetensors"
    if not store.create(path, data):
        raise StorageError(f"{store.url}/{path}: a file of that name is there already")
    return ShardFile(path, len(data), hashlib.sha256(data).hexdigest(), tuple(tensors))


class CheckpointReader:
    """Reads intervals of tensors out of a checkpoint's shards; every shard that is touched is verified."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self.bytes_read = 0
        self._read = lru_cache(maxsize=4)(self._read_shard)
        self._have: dict[str, list[tuple[int, Fragment]]] = {}
        self._entries: list[tuple[ShardFile, Entry]] = []
        for shard in manifest.shards:
            for entry in shard.entries:
                source = len(self._entries)
                self._entries.append((shard, entry))
                self._have.setdefault(entry.kind, []).append(
                    (source, Fragment(entry.name, entry.start, entry.length, offset=0))
                )

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
            StorageError: a shard is damaged, or an interval is in none.
        """
        plan, missing = copies(self._have.get(kind, []), want)
        if missing:
            raise StorageError(f"{self.store.url}: checkpoint of step {self.manifest.step}: no {kind} of {missing[0]}")
        for copy in plan:
            shard, entry = self._entries[copy.source]
            source = self._read(shard)[entry.key]
            target[copy.target_offset : copy.target_offset + copy.length] = source[
                copy.source_offset : copy.source_offset + copy.length
            ]

    def tensor(self, kind: str, name: str) -> np.ndarray:
        """Return a whole tensor in its shape."""
        shape = self.manifest.shapes[name]
        flat = np.empty(prod(shape), dtype=np.float32)
        self.fill(kind, [Fragment(name, 0, flat.size, 0)], flat)
        return flat.reshape(shape)

    def _read_shard(self, shard: ShardFile) -> dict[str, np.ndarray]:
        data = self.store.read(shard.path)
        self.bytes_read += len(data)
        if len(data) != shard.size or hashlib.sha256(data).hexdigest() != shard.sha256:
            raise StorageError(f"{self.store.url}/{shard.path}: damaged (its size or SHA-256 is not the manifest's)")
        return safetensors.numpy.load(data)
