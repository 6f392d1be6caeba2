"""Tokens and the ends of documents become a shard, whole or not at all."""

import hashlib
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from workers.common import disk
from workers.common.storage import Store, is_remote, storage_errors
from workers.data.corpus import Shard
from workers.data.tokens import BLOCK


class ShardWriter:
    """A shard that is being written: a temporary file on this machine's disk, whose name nobody looks for.

    Args:
        store: the prepared source's folder.
        name: of the shard.
        dtype: of its tokens.
    """

    def __init__(self, store: Store, name: str, dtype: np.dtype) -> None:
        self.store, self.name, self.dtype = store, name, dtype
        self.whole, self.sums, self.ends, self.tokens = hashlib.sha256(), bytearray(), bytearray(), 0
        self._block, self._counts, self._stack = bytearray(), bytearray(), ExitStack()

    def __enter__(self) -> "ShardWriter":
        with storage_errors(self.store.url):
            if is_remote(self.store.url):
                self._target = Path(self._stack.enter_context(tempfile.TemporaryDirectory()), self.name)
            else:
                self._target = Path(self.store.path(self.name))
            self._path = self._stack.enter_context(disk.temporary_beside(self._target))
            self._file = self._stack.enter_context(self._path.open("xb"))
        return self

    def __exit__(self, *_: object) -> None:
        with storage_errors(self.store.url):
            self._stack.close()

    def add(self, ids: np.ndarray, piece: int, row: int, counts: np.ndarray | None = None) -> None:
        """Append a document's tokens, and which of them are learned where not all are."""
        if counts is not None:
            self._counts += counts.tobytes()
        self._block += ids.astype(self.dtype).tobytes()
        self.tokens += len(ids)
        self.ends += np.array([self.tokens, piece, row], "<u8").tobytes()
        while len(self._block) >= BLOCK:
            self._flush(BLOCK)

    def publish(self) -> Shard | None:
        """Put the shard and what lies beside it into place; return its entry, None where it is empty."""
        if self._block:
            self._flush(len(self._block))
        if not self.tokens:
            return None
        with storage_errors(f"{self.store.url}/{self.name}"):
            self._file.flush()
            os.fsync(self._file.fileno())
            if is_remote(self.store.url):
                self.store.fs.put_file(str(self._path), self.store.path(self.name))
            else:
                self._path.replace(self._target)
        beside = {"sums": bytes(self.sums), "ends": bytes(self.ends)}
        if self._counts:
            beside["counts"] = np.packbits(np.frombuffer(self._counts, bool), bitorder="little").tobytes()
        hashes = {ending: hashlib.sha256(content).hexdigest() for ending, content in beside.items()}
        shard = Shard(self.name, self.tokens, self.whole.hexdigest(), **hashes)
        for ending, content in beside.items():
            self.store.put(shard.beside(ending), content)
        return shard

    def _flush(self, size: int) -> None:
        block = bytes(self._block[:size])
        del self._block[:size]
        self.whole.update(block)
        self.sums += hashlib.sha256(block).digest()
        with storage_errors(self.store.url):
            self._file.write(block)
