"""A store of S3's semantics whose every operation can be stopped: before, after or halfway, or its reply gets lost."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import fsspec
import pytest
from fsspec import AbstractFileSystem

Mode = Literal["before", "halfway", "after", "lost reply", "error"]
MODES: tuple[Mode, ...] = ("before", "halfway", "after", "lost reply", "error")


class Crash(BaseException):
    """The process that did this is dead."""


class CrashingS3(AbstractFileSystem):
    """Objects in memory; strongly consistent, whole or not there, as on S3."""

    protocol = ("crashing", "s3")
    cachable = False
    current: "CrashingS3"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes], float]] = {}
        self.conditional = True
        self.operations = 0
        self.log: list[str] = []
        self.plan: tuple[int, Mode] | None = None
        self.dead = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("crashing://").strip("/")

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def invalidate_cache(self, path: str | None = None) -> None:
        pass

    def stop(self, name: str, work: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Do an operation, unless it is the one that is stopped."""
        if self.dead:
            raise Crash
        self.operations += 1
        self.log.append(name)
        if self.plan is None or self.plan[0] != self.operations:
            return work()
        mode = self.plan[1]
        if mode == "error":
            raise OSError("503 Slow Down")
        if mode == "lost reply":
            work()
            raise OSError("the connection was cut")
        self.dead = True
        {"before": lambda: None, "halfway": half, "after": work}[mode]()
        raise Crash

    # -- what fsspec asks ----------------------------------------------------------------------------------------------

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return self.stop(f"get {path}", lambda: self._get(path)[0][start:end])

    def exists(self, path: str, **_: Any) -> bool:
        return self.stop(f"head {path}", lambda: any(key == path or key.startswith(f"{path}/") for key in self.objects))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return self.stop(f"head {path}", lambda: self._info(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = self.stop(f"list {path}", lambda: [key for key in self.objects if key.startswith(f"{path}/")])
        return [self._info(key) for key in found] if detail else found

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        found = self.stop(f"list {path}", lambda: [key for key in self.objects if key.startswith(f"{path}/")])
        return {key: self._info(key) for key in found} if detail else found

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.stop(f"put {path}", lambda: self._put(path, value, mode == "create" and self.conditional))

    def rm_file(self, path: str) -> None:
        self.stop(f"delete {path}", lambda: self.objects.pop(path, None))

    def call_s3(self, method: str, Bucket: str, Key: str = "", **fields: Any) -> Any:  # noqa: N803
        path = f"{Bucket}/{Key}"
        match method:
            case "create_multipart_upload":
                return self.stop(f"begin {path}", lambda: self._begin(path))
            case "upload_part":
                number, body, upload = fields["PartNumber"], fields["Body"], fields["UploadId"]
                half = lambda: self._part(upload, number, body[: len(body) // 2])  # noqa: E731
                return self.stop(f"part {number} of {path}", lambda: self._part(upload, number, body), half)
            case "complete_multipart_upload":
                return self.stop(f"complete {path}", lambda: self._complete(fields["UploadId"]))
            case "abort_multipart_upload":
                return self.stop(f"abort {path}", lambda: self.uploads.pop(fields["UploadId"]))
            case "list_multipart_uploads":
                found = [
                    {"Key": key.partition("/")[2], "UploadId": upload, "Initiated": datetime.fromtimestamp(at, UTC)}
                    for upload, (key, _, at) in self.uploads.items()
                ]
                return self.stop("list uploads", lambda: {"Uploads": found})
        raise AssertionError(method)

    def _get(self, path: str) -> tuple[bytes, float]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path]

    def _info(self, path: str) -> dict[str, Any]:
        data, at = self._get(path)
        return {"name": path, "size": len(data), "type": "file", "LastModified": datetime.fromtimestamp(at, UTC)}

    def _put(self, path: str, data: bytes, exclusive: bool) -> None:
        if exclusive and path in self.objects:
            raise FileExistsError(path)
        self.objects[path] = bytes(data), time.time()

    def _begin(self, path: str) -> dict[str, str]:
        name = f"upload-{self.operations}"
        self.uploads[name] = path, {}, time.time()
        return {"UploadId": name}

    def _part(self, upload: str, number: int, body: bytes) -> dict[str, str]:
        self.uploads[upload][1][number] = bytes(body)
        return {"ETag": str(number)}

    def _complete(self, upload: str) -> None:
        path, parts, _ = self.uploads.pop(upload)
        self.objects[path] = b"".join(data for _, data in sorted(parts.items())), time.time()


class _Current(AbstractFileSystem):
    """What `crashing://` means at the moment."""

    protocol = "crashing"
    cachable = False

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return CrashingS3.current


fsspec.register_implementation("crashing", _Current, clobber=True)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Shards of a few hundred bytes in several parts, one after the other, so that operations can be counted."""
    monkeypatch.setattr("workers.common.uploads.PART_BYTES", 128)
    monkeypatch.setattr("workers.common.uploads.PARTS_AT_ONCE", 1)
    monkeypatch.setattr("workers.checkpoint.shards.CHUNK", 128)
    monkeypatch.setattr("workers.checkpoint.shards.READS_AT_ONCE", 1)
