"""Blocks of remote files on a node's disk, shared by the processes of the node, no larger than a set size.

A block's file is named after what it is a block of, so that runs and corpora can share it. Nothing in it is believed:
whoever reads a block compares its hash, and reads it anew from where it comes from if it is another. So files need no
fsync, and a cache that cannot be written is only slow.

All writing happens under one lock of the node, which the kernel takes from a process that dies. So there is one file
at a time that is not whole, always under the same name, and the lock's file can say how much the cache holds.
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zlib import crc32

LOCK = "lock"
INCOMING = "incoming"
TURNS = 64
PATIENCE_S = 20.0
"""How long somebody else's turn is waited for; who holds it may have stopped."""
KEPT = 0.9
"""Of the limit, where something must go: not every block looks through all files."""


def node_cache(cache_gb: float) -> "BlockCache":
    """Return the cache of this node and user."""
    return BlockCache(Path(tempfile.gettempdir(), f"raymuon-blocks-{os.getuid()}"), int(cache_gb * 1e9))


class BlockCache:
    """Files by names of the form `FOLDER/FILE`; those that were not read for the longest time go first.

    Args:
        folder: on this node's disk; made when it is needed.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def has(self, name: str) -> bool:
        """Tell whether a file is there."""
        return os.access(f"{self.folder}/{name}", os.F_OK)

    def read(self, name: str, start: int = 0, stop: int = 1 << 40) -> bytes | None:
        """Return the bytes from `start` up to `stop`, fewer where the file is shorter; None where there is none."""
        try:
            file = os.open(f"{self.folder}/{name}", os.O_RDONLY)
            try:
                os.utime(file)  # Whether or not the disk notes when files are read.
                return os.pread(file, min(stop, os.fstat(file).st_size) - start, start)
            finally:
                os.close(file)
        except (OSError, ValueError):  # Of a file that is shorter than `start`.
            return None

    def put(self, name: str, data: bytes) -> None:
        """Keep a file, if there is room for it and the disk takes it."""
        if len(data) > self.limit:
            return
        with suppress(OSError), self._locked() as lock:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            replaced = path.stat().st_size if path.exists() else 0
            used = _number(os.pread(lock, 32, 0))
            if used is None or used - replaced + len(data) > self.limit:
                used = self._make_room(len(data), path)
                path.parent.mkdir(exist_ok=True)
                replaced = 0
            incoming = self.folder / INCOMING
            incoming.write_bytes(data)
            os.pwrite(lock, b"%020d\n" % max(0, used - replaced + len(data)), 0)
            incoming.replace(path)

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Let one process of the node at a time fetch what is named so: the others find it in the cache then."""
        try:
            folder = self.folder / "turns"
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / f"{crc32(name.encode()) % TURNS}", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            yield
            return
        try:
            until = time.monotonic() + PATIENCE_S
            while time.monotonic() < until:
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.005)
            yield
        finally:
            os.close(file)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def _make_room(self, size: int, replaced: Path) -> int:
        """Count what is there, and remove of it what must go for `size` more; return what remains."""
        found = []
        for folder in os.scandir(self.folder):
            if folder.is_dir() and folder.name != "turns":
                for file in os.scandir(folder):
                    about = file.stat()
                    found.append((about.st_mtime_ns, about.st_size, Path(file.path)))
        replaced.unlink(missing_ok=True)
        kept = [file for file in found if file[2] != replaced]
        used = sum(size for _, size, _ in kept)
        if used + size <= self.limit:
            return used
        for _, its, path in sorted(kept):
            if used <= max(0, int(self.limit * KEPT) - size):
                break
            path.unlink(missing_ok=True)
            used -= its
            with suppress(OSError):
                path.parent.rmdir()
        return used


def _number(text: bytes) -> int | None:
    try:
        return int(text)
    except ValueError:  # Nobody has counted yet.
        return None
