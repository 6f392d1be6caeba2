"""A look at one node, from a process on it that takes none of its resources; the driver looks at itself with it, too.

Without torch: versions are read from what is installed, so a node answers in a second. The folder that a probe makes in
a store, and the parents that it had to make for it on a disk, are gone after `tidy`.
"""

import os
import platform
import resource
import secrets
import shutil
import subprocess
import time
from contextlib import suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from jobs.doctor.seen import NodeSeen, PlaceSeen
from orchestrator.group.access import Access, auth_token, head_access
from orchestrator.group.usage import memory_here
from orchestrator.record.provenance import source_files
from workers.common.errors import RaymuonError, StorageError
from workers.common.source import digest
from workers.common.storage import Store, storage_errors

LIBRARIES = ("ray", "torch", "deepspeed", "numpy", "safetensors", "fsspec", "s3fs")
LARGE = "-large"
"""Ending of the name of the large file."""
PATIENCE_S = 20.0
"""How long a dashboard may take to answer: one that is busy is not dead."""
TRIED = 64 << 20
"""Bytes that are really written: into memory, and to a store (a multipart upload's usual part)."""


class NodeProbe:
    """One node, or the driver.

    Args:
        s3_endpoint: of storage.
    """

    def __init__(self, s3_endpoint: str) -> None:
        self._s3_endpoint = s3_endpoint
        self._made: set[Path] = set()

    def look(self) -> NodeSeen:
        """Return what the node is and has."""
        memory, available = memory_here()
        names, driver = _gpus()
        token = None
        with suppress(RaymuonError):
            token = auth_token()
        return NodeSeen(
            versions={"Python": platform.python_version(), **_versions(), "raymuon code": digest(source_files())},
            cpus=os.cpu_count() or 1,
            memory=memory,
            available=available,
            shm=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
            gpus=names,
            driver=driver,
            max_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            token_mode=os.environ.get("RAY_AUTH_MODE", "disabled").lower(),
            token_file=str(token.file) if token and token.readable_by_others else "",
        )

    def clock(self) -> float:
        """Return the time here, in seconds since the epoch."""
        return time.time()

    def access(self, dashboard_url: str) -> Access:
        """Return who may use the dashboard, as this node reaches it."""
        return head_access(dashboard_url, PATIENCE_S)

    def try_memory(self, nbytes: int) -> str:
        """Make an anonymous file of that size, as keepers do, and fill a part of it; return why it cannot be."""
        try:
            descriptor = os.memfd_create("raymuon-doctor", os.MFD_CLOEXEC)
        except OSError as error:
            return str(error)
        try:
            os.ftruncate(descriptor, nbytes)
            os.posix_fallocate(descriptor, 0, max(1, min(nbytes, TRIED)))
        except OSError as error:
            return str(error)
        finally:
            os.close(descriptor)
        return ""

    def use(self, url: str, folder: str, mark: str) -> PlaceSeen:
        """Create, read, list and delete files in a new folder of a store, time a large one, and leave a mark there."""
        store = Store(url, self._s3_endpoint).child(folder)
        try:
            self.note_parents(url)
            skew = _store_skew(store)
            fences = store.probe()
            store.put(mark, mark.encode())
            data, name = secrets.token_bytes(TRIED), f"{mark}{LARGE}"
            began = time.perf_counter()
            store.put(name, data)
            written = time.perf_counter()
            same = store.read(name) == data
            read = time.perf_counter()
            store.remove(name)
            if not same:
                raise StorageError(f"{url}: {TRIED >> 20} MiB were read back otherwise than they were written")
            if name in store.names(""):
                raise StorageError(f"{url}: a deleted file is still listed; check the right to delete")
        except StorageError as error:
            return PlaceSeen(error=str(error).replace(f"/{folder}", ""))
        return PlaceSeen(
            fences=fences,
            write_bytes_per_s=TRIED / (written - began),
            read_bytes_per_s=TRIED / (read - written),
            skew_s=skew,
        )

    def note_parents(self, url: str) -> None:
        """Remember which folders of a disk are not there yet, so that `tidy` removes them again."""
        with suppress(Exception):  # What is wrong with the URL is told when it is used.
            store = Store(url, self._s3_endpoint)
            if isinstance(store.fs, LocalFileSystem):
                folder = Path(store.path())
                self._made |= {place for place in (folder, *folder.parents) if not place.exists()}

    def mark(self, url: str, folder: str, mark: str) -> str:
        """Leave a mark in a new folder of a store; return why it cannot be."""
        store = Store(url, self._s3_endpoint).child(folder)
        try:
            self.note_parents(url)
            store.put(mark, mark.encode())
        except StorageError as error:
            return str(error).replace(f"/{folder}", "")
        return ""

    def marks(self, url: str, folder: str) -> list[str] | str:
        """Return the marks that can be read here, or why nothing can."""
        store = Store(url, self._s3_endpoint).child(folder)
        try:
            names = [name for name in store.names("") if not name.endswith(LARGE)]  # One that a probe has left.
            return [name for name in names if store.read(name) == name.encode()]
        except StorageError as error:
            return str(error).replace(f"/{folder}", "")

    def tidy(self, urls: list[str], folder: str) -> None:
        """Remove the folder from all the stores, and the parents that were made for it."""
        for url in urls:
            with suppress(RaymuonError):  # What is wrong with the URL was told when it was used.
                store = Store(url, self._s3_endpoint).child(folder)
                for name in store.files(""):
                    store.remove(name)
                if isinstance(store.fs, LocalFileSystem):
                    with suppress(OSError):
                        Path(store.path()).rmdir()
        for place in sorted(self._made, key=lambda place: len(place.parts), reverse=True):
            with suppress(OSError):  # Something is in it by now.
                place.rmdir()


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _gpus() -> tuple[tuple[str, ...], str]:
    """Return the names of the GPUs and NVIDIA's driver version."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return (), ""
    rows = [[part.strip() for part in line.split(",")] for line in told.splitlines() if "," in line]
    return tuple(name for name, _ in rows), rows[0][1] if rows else ""


def _store_skew(store: Store) -> float | None:
    """Return how much an S3 store's clock is ahead of ours."""
    if not store.url.startswith("s3"):
        return None
    with storage_errors(store.url):
        began = time.time()
        bucket = store.path().split("/", 1)[0]
        answer = store.fs.call_s3("head_bucket", Bucket=bucket)  # type: ignore[attr-defined]
        ours = (began + time.time()) / 2
    theirs = _date(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", ""))
    return theirs and theirs - ours


def _date(header: str) -> float | None:
    """Return seconds since the epoch of an HTTP date; None where it is none. Half a second is what it cuts off."""
    try:
        told: datetime = parsedate_to_datetime(header)
    except ValueError:
        return None
    return told.timestamp() + 0.5
