"""Big files into storage: in parts, several at a time, no faster than allowed; whole at the end, or not there at all.

On S3 a multipart upload is invisible until it is completed, and is aborted if anything fails. On disk the parts go into
a temporary file, which takes its name at the end.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem

from workers.common.disk import publish, temporary_beside
from workers.common.storage import Store, storage_errors

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
"""Of an upload; S3 allows no more."""
PARTS_AT_ONCE = 4


class Content(Protocol):
    """What is uploaded."""

    size: int
    """Bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` up to `stop`; called from several threads."""
        ...


class Bandwidth:
    """A limit that all uploads of a process share.

    Args:
        bytes_per_s: None for no limit.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, size: int) -> None:
        """Wait until `size` bytes may go."""
        if self.bytes_per_s is None:
            return
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + size / self.bytes_per_s
        time.sleep(max(0.0, begin - time.monotonic()))


def upload(store: Store, path: str, content: Content, bandwidth: Bandwidth) -> None:
    """Write a file under a name that nobody else uses.

    Raises:
        StorageError: it could not be written; nothing of it is left.
    """
    with storage_errors(f"{store.url}/{path}"), _sink(store, path, content.size) as sink:
        part = max(PART_BYTES, -(-content.size // (MAX_PARTS * PART_BYTES)) * PART_BYTES)

        def put(start: int) -> None:
            data = content.read(start, min(start + part, content.size))
            bandwidth.take(len(data))
            sink.put(start // part, start, data)

        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="part") as threads:
            parts = [threads.submit(put, start) for start in range(0, content.size, part)]
            try:
                for done in parts:
                    done.result()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise
        sink.complete()


class _Sink(Protocol):
    """A file that is being written."""

    def put(self, number: int, start: int, data: bytes) -> None: ...
    def complete(self) -> None: ...


@contextmanager
def _sink(store: Store, path: str, size: int) -> Iterator[_Sink]:
    target, fs = store.path(path), store.fs
    if isinstance(fs, LocalFileSystem):
        with temporary_beside(Path(target)) as temporary, temporary.open("xb") as file:
            yield _LocalSink(file.fileno(), temporary, Path(target))
    elif "s3" in fs.protocol and size > PART_BYTES:
        with _multipart(fs, target) as sink:
            yield sink
    else:
        yield _WholeSink(fs, target)


class _LocalSink:
    def __init__(self, descriptor: int, temporary: Path, target: Path) -> None:
        self.descriptor, self.temporary, self.target = descriptor, temporary, target

    def put(self, number: int, start: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self.descriptor, view, start)
            view, start = view[written:], start + written

    def complete(self) -> None:
        os.fsync(self.descriptor)
        publish(self.temporary, self.target)


@contextmanager
def _multipart(fs: Any, target: str) -> Iterator["_S3Sink"]:
    bucket, key, _ = fs.split_path(target)
    place = {"Bucket": bucket, "Key": key}
    place["UploadId"] = fs.call_s3("create_multipart_upload", **place)["UploadId"]
    try:
        yield _S3Sink(fs, place)
    except BaseException:
        with suppress(Exception):  # What cannot be aborted now is collected later.
            fs.call_s3("abort_multipart_upload", **place)
        raise


class _S3Sink:
    def __init__(self, fs: Any, place: dict[str, str]) -> None:
        self.fs, self.place = fs, place
        self.tags: dict[int, str] = {}

    def put(self, number: int, start: int, data: bytes) -> None:
        # Parts count from 1.
        answer = self.fs.call_s3("upload_part", PartNumber=number + 1, Body=data, **self.place)
        self.tags[number + 1] = answer["ETag"]

    def complete(self) -> None:
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(self.tags.items())]
        self.fs.call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **self.place)
        self.fs.invalidate_cache()


class _WholeSink:
    """Everything in one request: a small file, or a filesystem of which we know no better."""

    def __init__(self, fs: Any, target: str) -> None:
        self.fs, self.target = fs, target
        self.parts: dict[int, bytes] = {}

    def put(self, number: int, start: int, data: bytes) -> None:
        self.parts[start] = data

    def complete(self) -> None:
        self.fs.pipe_file(self.target, b"".join(data for _, data in sorted(self.parts.items())))


def abort_old_uploads(store: Store, before: float) -> int:
    """Abort multipart uploads into the folder that were begun before a time and never ended; return how many."""
    if "s3" not in store.fs.protocol:
        return 0
    fs: Any = store.fs
    bucket, prefix, _ = fs.split_path(store.path())
    with storage_errors(store.url):
        found = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/").get("Uploads", [])
        old = [one for one in found if one["Initiated"].timestamp() < before]
        for one in old:
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])
    return len(old)
