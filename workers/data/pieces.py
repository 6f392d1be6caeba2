"""A piece of the data: a file or a part of one, as a task is given it, small and the same for every process.

Where a file is cut into pieces depends on the file alone, so that any number of tasks makes the same of it; every
document, line, row and token belongs to exactly one piece.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile

from workers.common.errors import ConfigError, StorageError
from workers.common.storage import open_place, open_source, storage_errors

PIECE_BYTES = 64 * 2**20
"""A file that can be cut is cut into pieces of about so many."""
TO_THE_END = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or a part of it."""

    url: str
    """Of the file: an absolute local path, a URL, or a chain of them, as `zip://a.txt::s3://bucket/a.zip`."""
    format: str
    """text, jsonl, parquet, arrow, npy, megatron or docstrings; empty where it is nothing that is read."""
    start: int = 0
    """First byte of JSONL, row group of Parquet, record batch of Arrow, token of npy, document of Megatron."""
    stop: int = TO_THE_END
    """Behind the last one."""
    size: int = 0
    """In bytes, to balance tasks by; 0 where a server does not tell."""
    compression: str = ""
    """gzip or zstd."""
    wrong: str = ""
    """Why the file is not read; it counts as one bad document."""
    s3_endpoint: str = ""
    """Of the S3 store that it is in, where that is not AWS."""


def url_of(fs: AbstractFileSystem, path: str, s3_endpoint: str = "") -> str:
    """Return the URL under which `opened` finds a file again.

    Raises:
        ConfigError: there is none, because of what stands in its name.
    """
    url = path if isinstance(fs, LocalFileSystem) else _chain(_protocol(fs), path, fs.storage_options)
    again, found = _open(url, s3_endpoint)
    same = isinstance(again, LocalFileSystem) if isinstance(fs, LocalFileSystem) else again == fs
    if not same or found != path:
        raise ConfigError(f"{url!r}: it would be opened as {found!r}; rename it: letters, digits, -, _, . and single /")
    return url


def _protocol(fs: AbstractFileSystem) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]


def _chain(protocol: str, path: str, options: dict[str, Any]) -> str:
    """Return `path` in a file system of that protocol, and behind it what that one reads from."""
    if protocol in ("file", "local") or "://" in path:
        return f"file://{path}" if path.startswith("/") else path
    if behind := options.get("target_protocol"):
        inner = options.get("target_options") or {}
        if issubclass(fsspec.get_filesystem_class(protocol), AbstractArchiveFileSystem):
            return f"{protocol}://{path}::{_chain(behind, options['fo'], inner)}"
        return f"{protocol}::{_chain(behind, path, inner)}"  # A cache: its paths are those of what it reads.
    return f"{protocol}://{path}"


def _open(url: str, s3_endpoint: str) -> tuple[AbstractFileSystem, str]:
    if url.startswith("/"):  # A local path stands for itself, whatever is in it, links too.
        return open_place(url)
    return open_source(url, s3_endpoint)


def opened(piece: Piece) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a piece, and the path in it."""
    return _open(piece.url, piece.s3_endpoint)


class Source:
    """A file that is read; what fails here is the storage's fault, and what fails above it the file's."""

    failed: StorageError | None = None
    """Kept, for Arrow makes errors of its own of it."""

    def __init__(self, file: Any, url: str) -> None:
        self.file, self.url, self.closed = file, url, False

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        with self._kept():
            if size > 0 and isinstance(whole := getattr(self.file, "size", None), int):
                size = min(size, max(0, whole - self.file.tell()))  # A damaged file may ask for terabytes.
            return cast(bytes, self.file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte."""
        if offset < 0 and whence == 0:
            raise ValueError(f"there is no byte {offset}")  # A damaged file asks for it.
        with self._kept():
            return self.file.seek(offset, whence)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            with storage_errors(self.url):
                yield
        except StorageError as error:
            self.failed = error
            raise

    def tell(self) -> int:
        """Return the byte that is next."""
        return self.file.tell()

    def readable(self) -> bool:
        """Tell that it is read."""
        return True

    def seekable(self) -> bool:
        """Tell whether there is a way back."""
        return self.file.seekable()

    def writable(self) -> bool:
        """Tell that it is not written."""
        return False

    def close(self) -> None:
        """Close it."""
        self.closed = True
        self.file.close()


@contextmanager
def source_of(piece: Piece, beside: str = "") -> Iterator[Source]:
    """Open the file of a piece, or the one beside it whose name has another ending.

    Raises:
        StorageError: it is not there, or cannot be read.
    """
    fs, path = opened(piece)
    url = piece.url
    if beside:
        url, path = other_ending(url, beside), other_ending(path, beside)
    with storage_errors(url):
        file = fs.open(path, "rb")
    if isinstance(file, MemoryFile):  # One object for all who open it, with one position.
        file = io.BytesIO(file.getbuffer())
    source = Source(file, url)
    try:
        yield source
    finally:
        source.close()


def other_ending(name: str, ending: str) -> str:
    """Return a path or URL, or the first one of a chain, with another ending of four letters."""
    first, *behind = name.split("::", 1)
    return "::".join((first[:-4] + ending, *behind))


def cuts(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Gather neighbouring parts of these sizes to pieces of about PIECE_BYTES; return (start, stop, size) of each."""
    found, start, held = [], 0, 0
    for number, size in enumerate(sizes):
        held += size
        if held >= PIECE_BYTES or number == len(sizes) - 1:
            found.append((start, number + 1, held))
            start, held = number + 1, 0
    return found


def even_cuts(count: int, size: int) -> list[tuple[int, int, int]]:
    """Cut `count` parts of which nobody knows more than their size together."""
    pieces = min(count, -(-size // PIECE_BYTES))
    ends = [count * number // pieces for number in range(pieces + 1)] if pieces else []
    return [(start, stop, size * (stop - start) // count) for start, stop in itertools.pairwise(ends)]
