"""Files under any fsspec URL: one way to open a place, to create a file only where none is, and to name what failed.

Everything that raymuon keeps goes through here, so that a local folder and an S3 bucket behave alike and so that every
failure becomes a StorageError which names the URL.
"""

import difflib
import os
import re
import secrets
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.chained import ChainedFileSystem
from fsspec.implementations.local import LocalFileSystem

from workers.common import disk
from workers.common.errors import ConfigError, NotFoundError, RaymuonError, StorageError

READS_AT_ONCE = 32
"""Small files of a folder."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LOCAL = ("file", "local")
_WEB = ("http", "https", "data")
"""Their paths are the server's own affair; nothing can be written there."""
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "oss")
_S3_CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 20,  # s3fs tries five times what botocore has tried four times.
    "retries": {"max_attempts": 3},
    # Some stores send the whole file's checksum with a range of it; what matters has hashes of its own.
    "response_checksum_validation": "when_required",
}
_keys: list[tuple[int, ...]] | None = None
"""How the files of S3's keys looked when they were read last."""
_keys_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class File:
    """A file's size in bytes, and when it was changed, in seconds since the epoch."""

    size: int
    modified: float


@dataclass(frozen=True)
class Store:
    """A folder under an fsspec URL; `path` arguments are relative to it."""

    url: str
    s3_endpoint: str = ""
    """URL of the S3 store that it is in, where that is not AWS; empty for AWS, or for what the environment says."""

    def child(self, path: str) -> "Store":
        """Return the folder `path` below this one."""
        return Store(f"{self.url.rstrip('/')}/{path}", self.s3_endpoint)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _seen_as(self.url))

    @property
    def fs(self) -> AbstractFileSystem:
        """The filesystem."""
        return open_place(self.url, self.s3_endpoint)[0]

    def path(self, path: str = "") -> str:
        """Return the path that the filesystem wants."""
        root = open_place(self.url, self.s3_endpoint)[1].rstrip("/")
        return f"{root}/{path}" if path else root

    def read(self, path: str) -> bytes:
        """Return the whole file."""
        with storage_errors(f"{self.url}/{path}"):
            return bytes(self.fs.cat_file(self.path(path)))  # type: ignore[arg-type]

    def read_all(self, paths: Sequence[str]) -> Iterator[bytes]:
        """Yield the content of many small files in order; they are read at the same time, so many at once."""
        fs = self.fs  # Of this thread: each of the others would make a client of its own.

        def read(path: str, target: str) -> bytes:
            with storage_errors(f"{self.url}/{path}"):
                return bytes(fs.cat_file(target))  # type: ignore[arg-type]

        with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="read") as threads:
            for first in range(0, len(paths), READS_AT_ONCE):
                some = paths[first : first + READS_AT_ONCE]
                yield from threads.map(read, some, [self.path(path) for path in some])

    def exists(self, path: str = "") -> bool:
        """Tell whether the file or folder is there."""
        with storage_errors(f"{self.url}/{path}"):
            try:
                self.fs.info(self.path(path))  # `exists` takes wrong keys and a dead server for a no.
            except FileNotFoundError:
                return False
            return True

    def names(self, folder: str) -> list[str]:
        """Return the sorted names in a folder, without it; none if the folder is missing."""
        with storage_errors(f"{self.url}/{folder}"):
            try:
                names = {path.rsplit("/", 1)[-1] for path in self.fs.ls(self.path(folder), detail=False)}
                return sorted(names - {""})  # Some stores list the folder in itself.
            except (FileNotFoundError, NotADirectoryError):
                return []

    def files(self, folder: str) -> dict[str, File]:
        """Return all files below a folder by their paths from here; none if the folder is missing."""
        with storage_errors(f"{self.url}/{folder}"):
            try:
                found = self.fs.find(self.path(folder), detail=True)
            except FileNotFoundError:
                return {}
        root = len(self.path()) + 1
        return {path[root:]: File(info["size"], _modified(info)) for path, info in found.items()}  # type: ignore[union-attr]

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`; fewer where the file is shorter."""
        with storage_errors(f"{self.url}/{path}"):
            return bytes(self.fs.cat_file(self.path(path), start=start, end=stop))  # type: ignore[arg-type]

    def put(self, path: str, data: bytes) -> None:
        """Write a small file, over what is there."""
        with storage_errors(f"{self.url}/{path}"):
            target = self.path(path)
            if isinstance(self.fs, LocalFileSystem):
                with disk.temporary_with(Path(target), data) as temporary:
                    temporary.replace(target)
            else:
                self.fs.pipe_file(target, data)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there, and on disk its folder, if that is empty then."""
        target = self.path(path)
        with storage_errors(f"{self.url}/{path}"), suppress(FileNotFoundError):
            self.fs.rm_file(target)
        if isinstance(self.fs, LocalFileSystem):
            with suppress(OSError):
                Path(target).parent.rmdir()

    @contextmanager
    def whole_or_nothing(self) -> Iterator[None]:
        """Take away all that is in this folder, which was empty before, if what writes it does not come to its end."""
        try:
            yield
        except BaseException:
            with suppress(StorageError), storage_errors(self.url):
                for name in self.names(""):  # One by one: fsspec removes no folder that a process works in.
                    self.fs.rm(self.path(name), recursive=True)
                if isinstance(self.fs, LocalFileSystem):
                    Path(self.path()).rmdir()
            raise

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that must not be there yet; of writers with different content exactly one gets True.

        Whoever finds its own content there gets True, too: an earlier try may have written it. On disk: a temporary
        file, fsync, a hard link, which fails where the name is taken. On S3: `If-None-Match: *`. In both cases the file
        is there whole or not at all; where a disk has no hard links, it may be empty for a moment.
        """
        with storage_errors(f"{self.url}/{path}"):
            target = self.path(path)
            if isinstance(self.fs, LocalFileSystem):
                return disk.create(Path(target), data)
            if self.fs.exists(target):  # Not every store honours the condition; there this narrows the race.
                return bytes(self.fs.cat_file(target)) == data  # type: ignore[arg-type]
            return self._create_remote(target, data)

    def _create_remote(self, target: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(target, data, mode="create")
        except Exception:
            # The client repeats a request whose reply was lost, and is then refused because of itself; and not
            # every store says in the same words why it refuses. What is there now decides.
            try:
                return bytes(self.fs.cat_file(target)) == data  # type: ignore[arg-type]
            except FileNotFoundError:
                pass
            raise
        return True

    def probe(self) -> bool:
        """Write a small file twice, find it as the run log finds its entries, remove it.

        Returns:
            Whether the store refused the second create, as it should.

        Raises:
            StorageError: the place is missing, read-only, full or refuses our credentials, or it does not list what is
                in it under the name that it was given.
        """
        if self.url.startswith("s3"):
            with storage_errors(self.url):  # Some stores make a missing bucket at the first write.
                self.fs.info(self.path().split("/", 1)[0])
        name = f".raymuon-probe-{secrets.token_hex(8)}"
        self.create(name, b"first")
        local = isinstance(self.fs, LocalFileSystem)
        with storage_errors(self.url):
            refused = not (self.create(name, b"second") if local else self._create_remote(self.path(name), b"second"))
            listed = name in self.names("")
            self.fs.rm_file(self.path(name))
        if not listed:
            raise StorageError(
                f"{self.url}: what is written there is not found again by listing, so no checkpoint would ever count; "
                "name a folder of letters, digits, - and _, and check the right to list"
            )
        return refused


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what a filesystem raises into a StorageError that names the URL and the way to mend it."""
    try:
        yield
    except RaymuonError:
        raise
    except FileNotFoundError as error:
        hint = "create the bucket, or check its name" if url.startswith("s3") else "check the path"
        raise NotFoundError(f"{url}: not found ({error}); {hint}") from error
    except ImportError as error:
        raise StorageError(f"{url}: a package is missing here ({error}); install it on the driver and nodes") from error
    except PermissionError as error:
        raise StorageError(f"{url}: access denied ({error}); check the keys and the rights that they have") from error
    except Exception as error:  # botocore and aiohttp have exceptions of their own, with no common base.
        raise StorageError(f"{url}: {type(error).__name__}: {error}") from error


def _modified(info: dict[str, Any]) -> float:
    """Return when a file was changed, in seconds since the epoch; 0 where nobody knows."""
    found = info.get("mtime") or info.get("LastModified") or info.get("modified") or info.get("created") or 0.0
    return found.timestamp() if isinstance(found, datetime) else float(found)


def _seen_as(url: str) -> str:
    """Return the only form of a URL under which what is written is found again by listing; a local path as it is.

    Raises:
        ConfigError: it has none.
    """
    if not (parts := _URL.fullmatch(url.strip())):
        if (word := url.partition(":")[0]) != url and _is_protocol(word):
            raise ConfigError(f"{url!r}: no path and no URL; a URL begins with {word}://")
        return url
    protocol, rest = parts[1].lower(), parts[2]
    if not _is_protocol(protocol):
        near = difflib.get_close_matches(protocol, fsspec.available_protocols(), 1)
        guess = f"; did you mean {near[0]}://?" if near else ""
        known = ", ".join(sorted(fsspec.available_protocols()))
        raise ConfigError(f"{url!r}: there is no protocol {protocol!r}{guess} Known are a plain path and {known}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in rest):
        raise ConfigError(f"{url!r}: there is a letter in it that cannot be printed; leave it out")
    if protocol in _LOCAL:
        return rest
    if protocol in _WEB:
        return url
    host, *path = rest.split("/")
    path = [part for part in path if part]  # Stores, and s3fs, do not agree on what an empty part is.
    if protocol in _BUCKETS and not host:
        raise ConfigError(f"{url!r}: it names no bucket; write {protocol}://BUCKET/FOLDER")
    for bad, what in (("\\", "a backslash"), ("::", "`::`, which chains file systems,"), ("?versionId=", "a version")):
        if bad in rest:
            raise ConfigError(f"{url!r}: {what} in it would not be found again by every store; leave it out")
    if {".", ".."} & set(path):
        raise ConfigError(f"{url!r}: `.` and `..` are no folders in a store; write the path without them")
    return "/".join((f"{protocol}://{host}", *path))


def _is_protocol(name: str) -> bool:
    return name in fsspec.available_protocols() or name in fsspec.registry


def absolute_url(url: str) -> str:
    """Return the one form of a URL, and a local path as an absolute one: the same place from every process.

    Raises:
        ConfigError: it names no place, or one whose files no store would find again.
    """
    if "\0" in url:
        raise ConfigError(f"{url!r}: no path has a zero byte in it")
    url = _seen_as(url)
    return url if is_remote(url) else str(local_path(url))


def local_path(text: str) -> Path:
    """Return a path on this machine as an absolute one.

    Raises:
        ConfigError: it begins with the home of somebody who has none, its links lead in a circle, or the current folder
            was removed.
    """
    try:
        return Path(text).expanduser().resolve()
    except RuntimeError as error:
        raise ConfigError(f"{text!r}: {error}; write the path out, or set HOME") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{text!r}: the current folder was removed; go to another one") from error


def shared_url(url: str) -> str:
    """Do the same for a place that other processes have to find.

    Raises:
        ConfigError: as above, or what is written there is seen by no other process.
    """
    url = absolute_url(url)
    if url.startswith("memory://"):
        raise ConfigError(
            f"{url!r}: what is written there is this process' alone, and goes with it; name another place"
        )
    return url


def is_remote(url: str) -> bool:
    """Tell a URL from a path on this machine."""
    return _URL.fullmatch(url) is not None


def open_place(url: str, s3_endpoint: str = "") -> tuple[AbstractFileSystem, str]:
    """Return the filesystem of a URL or a local path, and the path that it wants.

    fsspec keeps one instance for each place and endpoint. It lists anew each time: others write there, too.

    Args:
        url: of the place.
        s3_endpoint: URL of the S3 store that it is in, where it is in one that is not AWS.
    """
    if not is_remote(url):  # fsspec would take a `::` in it for a chain.
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    fs, path = fsspec.url_to_fs(url, **(_s3_options(url, s3_endpoint) or {"use_listings_cache": False}))
    return fs, str(path)


def open_source(url: str, s3_endpoint: str = "") -> tuple[AbstractFileSystem, str]:
    """Do the same for what is only read: it may lie in an archive or behind a cache, as in `zip://*.txt::s3://b/a.zip`.

    Raises:
        ConfigError: it names no place.
    """
    first, *others = (part.partition("://")[0] for part in url.split("::"))
    if others and _is_protocol(first):
        with storage_errors(url):
            if issubclass(fsspec.get_filesystem_class(first), ChainedFileSystem | AbstractArchiveFileSystem):
                behind = {name: _s3_options(name, s3_endpoint) for name in others if name.startswith("s3")}
                return fsspec.url_to_fs(url, **behind)
    return open_place(absolute_url(url), s3_endpoint)


def _s3_options(url: str, endpoint: str) -> dict[str, Any]:
    """Return how S3 is talked to; nothing for a place that is not there."""
    if not url.startswith("s3"):
        return {}
    _follow_keys()
    known = {"endpoint_url": endpoint} if endpoint else {}
    return {"use_listings_cache": False, "config_kwargs": _S3_CLIENT, **known}


def _follow_keys() -> None:
    """Begin anew with S3 where the files of keys have changed: botocore reads them once in a client's life."""
    global _keys
    files = [
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
        os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
    ]
    now = [_state_of(Path(file)) for file in files]
    with _keys_lock:
        if now != _keys:
            if _keys is not None:  # Whoever is in the middle of something keeps its client.
                fsspec.get_filesystem_class("s3").clear_instance_cache()
            _keys = now


def _state_of(file: Path) -> tuple[int, ...]:
    try:
        found = file.expanduser().stat()
    except (OSError, RuntimeError):  # There may be no home.
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino
