"""Files under any fsspec URL: one way to open a place, to create a file only where none is, and to name what failed.

Everything that raymuon keeps goes through here, so that a local folder and an S3 bucket behave alike and so that every
failure becomes a StorageError which names the URL.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from workers.errors import NotFoundError, StorageError


def configure_s3(endpoint: str = "") -> None:
    """Set how this process talks to S3: fsspec's own defaults, so that every user of fsspec in it follows.

    Args:
        endpoint: URL of a store that is not AWS; empty for AWS, or for what the environment says.
    """
    options = fsspec.config.conf.setdefault("s3", {})
    options["config_kwargs"] = {
        "connect_timeout": 5,
        "read_timeout": 20,  # s3fs tries five times what botocore has tried four times.
        "retries": {"max_attempts": 3},
        # Some stores send the whole file's checksum with a range of it; what matters has hashes of its own.
        "response_checksum_validation": "when_required",
    }
    options["use_listings_cache"] = False  # Another process's new file has to be seen.
    if endpoint:
        options["endpoint_url"] = endpoint


@dataclass(frozen=True, slots=True)
class File:
    """A file's size in bytes, and when it was changed, in seconds since the epoch."""

    size: int
    modified: float


@dataclass(frozen=True)
class Store:
    """A folder under an fsspec URL; `path` arguments are relative to it."""

    url: str

    def child(self, path: str) -> "Store":
        """Return the folder `path` below this one."""
        return Store(f"{self.url.rstrip('/')}/{path}")

    @property
    def fs(self) -> AbstractFileSystem:
        """The filesystem; fsspec keeps one instance for each. It lists anew each time: others write there, too."""
        return fsspec.url_to_fs(self.url, use_listings_cache=False)[0]

    def path(self, path: str = "") -> str:
        """Return the path that the filesystem wants."""
        root = str(self.fs._strip_protocol(self.url)).rstrip("/")
        return f"{root}/{path}" if path else root

    def read(self, path: str) -> bytes:
        """Return the whole file."""
        with storage_errors(f"{self.url}/{path}"):
            return bytes(self.fs.cat_file(self.path(path)))  # type: ignore[arg-type]

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
                with _temporary(Path(target), data) as temporary:
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

    def create(self, path: str, data: bytes) -> bool:
        """Write a file that must not be there yet; of writers with different content exactly one gets True.

        Whoever finds its own content there gets True, too: an earlier try may have written it. On disk: a temporary
        file, fsync, a hard link, which fails where the name is taken. On S3: `If-None-Match: *`. In both cases the file
        is there whole or not at all.
        """
        with storage_errors(f"{self.url}/{path}"):
            target = self.path(path)
            if isinstance(self.fs, LocalFileSystem):
                return _create_local(Path(target), data)
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
        """Write a small file twice, remove it, and tell whether the store refused the second create, as it should.

        Raises:
            StorageError: the place is missing, read-only, full or refuses our credentials.
        """
        if self.url.startswith("s3"):
            with storage_errors(self.url):  # Some stores make a missing bucket at the first write.
                self.fs.info(self.path().split("/", 1)[0])
        name = f".raymuon-probe-{secrets.token_hex(8)}"
        self.create(name, b"first")
        local = isinstance(self.fs, LocalFileSystem)
        with storage_errors(self.url):
            refused = not (self.create(name, b"second") if local else self._create_remote(self.path(name), b"second"))
            self.fs.rm_file(self.path(name))
        return refused


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what a filesystem raises into a StorageError that names the URL and the way to mend it."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        hint = "create the bucket, or check its name" if url.startswith("s3") else "check the path"
        raise NotFoundError(f"{url}: not found ({error}); {hint}") from error
    except PermissionError as error:
        raise StorageError(f"{url}: access denied ({error}); check the keys and the rights that they have") from error
    except Exception as error:  # botocore and aiohttp have exceptions of their own, with no common base.
        raise StorageError(f"{url}: {type(error).__name__}: {error}") from error


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Name a temporary file beside the target; it is gone afterwards, and the target's name survives a power cut."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


@contextmanager
def _temporary(target: Path, data: bytes) -> Iterator[Path]:
    """The same, with `data` in it."""
    with temporary_beside(target) as temporary:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary


def _create_local(target: Path, data: bytes) -> bool:
    try:
        with _temporary(target, data) as temporary:
            os.link(temporary, target)
    except FileExistsError:
        sync_folder(target.parent)  # An earlier try may have ended before that.
        return target.read_bytes() == data
    return True


def _modified(info: dict[str, Any]) -> float:
    """Return when a file was changed, in seconds since the epoch; 0 where nobody knows."""
    found = info.get("mtime") or info.get("LastModified") or info.get("modified") or info.get("created") or 0.0
    return found.timestamp() if isinstance(found, datetime) else float(found)


def sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def absolute_url(url: str) -> str:
    """Return a local path as an absolute one, so that processes with another working directory find it."""
    return url if "://" in url or "::" in url else str(Path(url).expanduser().resolve())
