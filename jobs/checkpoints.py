"""`raymuon checkpoints`: list what a run has committed; show, compare, verify, delete and pin checkpoints.

`s3_endpoint` is of an S3 store that is not AWS.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.log.retention import delete
from orchestrator.log.run_log import RunLog, find_commit, split_step
from workers.checkpoint.manifest import Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.common.errors import ConfigError, DamagedError, StorageError
from workers.common.storage import Store, absolute_url


def list_checkpoints(url: str, s3_endpoint: str = "") -> list[dict[str, Any]]:
    """Return every commit of the run at `url`, or of all runs under it, oldest first.

    Raises:
        StorageError: nothing is there.
    """
    store = Store(absolute_url(url), s3_endpoint)
    if not store.exists():
        raise StorageError(f"{url}: no such folder or bucket")
    runs = [store] if store.names("log") else [store.child(name) for name in store.names("")]
    return [row for run in runs for row in _rows(RunLog(run))]


def _rows(log: RunLog) -> list[dict[str, Any]]:
    rows = []
    for commit in log.commits:
        manifest, damaged = None, ""
        try:
            manifest = Manifest.read(log.store, commit.manifest, commit.sha256)
        except DamagedError as error:
            damaged = str(error)
        rows.append(
            {
                "run_id": log.run_id,
                "step": commit.step,
                "attempt": commit.attempt,
                "time": commit.time,
                "world_size": manifest and manifest.world_size,
                "tokens": manifest and manifest.counters["tokens"],
                "bytes": manifest and manifest.size,
                "metrics": commit.metrics,
                "pinned": commit.manifest in log.pins,
                "damaged": damaged,
                "url": f"{log.store.url}@{commit.step}",
            }
        )
    return rows


def open_checkpoint(url: str, s3_endpoint: str = "") -> CheckpointReader:
    """Open the checkpoint at `URL[@STEP]`.

    Raises:
        ConfigError: there is none.
        DamagedError: it is not what was committed.
    """
    log, commit = find_commit(url, s3_endpoint)
    return CheckpointReader(log.store, Manifest.read(log.store, commit.manifest, commit.sha256))


@dataclass(frozen=True)
class Verified:
    """What reading a whole checkpoint has shown."""

    step: int
    files: int
    bytes: int
    damaged: list[str]
    """A sentence about each file that is."""


def verify(url: str, s3_endpoint: str = "") -> Verified:
    """Read every byte of the checkpoint at `URL[@STEP]`, and hold it against the hashes.

    Raises:
        ConfigError: there is none.
    """
    log, commit = find_commit(url, s3_endpoint)
    try:
        manifest = Manifest.read(log.store, commit.manifest, commit.sha256)
    except DamagedError as error:
        return Verified(commit.step, 1, 0, [*log.damaged, str(error)])
    damaged = [*log.damaged, *CheckpointReader(log.store, manifest).verify()]
    return Verified(commit.step, 1 + len(manifest.shards), manifest.size, damaged)


def remove(url: str, force: bool, s3_endpoint: str = "") -> str:
    """Delete the checkpoint at `URL@STEP`.

    Raises:
        ConfigError: there is none, it is pinned, or it is the newest.
    """
    log, commit = find_commit(url, s3_endpoint)
    if split_step(url)[1] is None:
        raise ConfigError(f"{url}: say which one: {url}@{commit.step}")
    if commit == log.find() and not force:
        raise ConfigError(f"{url} is the newest checkpoint, with which the run would go on; --force deletes it")
    if not delete(log, commit, "raymuon checkpoints rm"):
        raise ConfigError(f"{url} is pinned; let it go first: raymuon checkpoints pin --undo {url}")
    return f"{log.store.url}@{commit.step}"


def pin(url: str, reason: str, undo: bool, s3_endpoint: str = "") -> str:
    """Keep the checkpoint at `URL[@STEP]` whatever the retention says, or let it go again.

    Raises:
        ConfigError: there is none.
    """
    log, commit = find_commit(url, s3_endpoint)
    log.mark("unpin" if undo else "pin", commit, reason)
    return f"{log.store.url}@{commit.step}"


def show(url: str, s3_endpoint: str = "") -> dict[str, Any]:
    """Return what a checkpoint holds, and what it comes from: its identity, counters, lineage and tensors."""
    reader = open_checkpoint(url, s3_endpoint)
    manifest = reader.manifest
    return {
        "run_id": manifest.run_id,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "world_size": manifest.world_size,
        "identity": manifest.identity,
        "counters": manifest.counters,
        "lineage": manifest.lineage and manifest.lineage.encode(),
        "shards": [{"path": shard.path, "size": shard.size} for shard in manifest.shards],
        "tensors": [
            {"kind": kind, "name": name, "shape": manifest.shapes[name]}
            for kind in reader.kinds
            for name in reader.names(kind)
        ],
    }


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two checkpoints."""

    kind: str
    name: str
    max_abs: float | None
    """Largest absolute difference; None where a side lacks the tensor or has another shape."""
    bitwise_equal: bool
    note: str = ""


def diff(first: str, second: str, s3_endpoint: str = "") -> list[TensorDifference]:
    """Compare two checkpoints, tensor by tensor, whatever the world sizes at which they were saved."""
    left, right = open_checkpoint(first, s3_endpoint), open_checkpoint(second, s3_endpoint)
    keys = {(kind, name): None for reader in (left, right) for kind in reader.kinds for name in reader.names(kind)}
    return [_compare(left, right, kind, name) for kind, name in keys]


def _compare(left: CheckpointReader, right: CheckpointReader, kind: str, name: str) -> TensorDifference:
    for side, reader in (("first", left), ("second", right)):
        if name not in reader.names(kind):
            return TensorDifference(kind, name, None, False, f"not in the {side} checkpoint")
    shapes = left.manifest.shapes[name], right.manifest.shapes[name]
    if shapes[0] != shapes[1]:
        return TensorDifference(kind, name, None, False, f"shapes {shapes[0]} and {shapes[1]}")
    a, b = left.tensor(kind, name), right.tensor(kind, name)
    return TensorDifference(kind, name, float(np.abs(a - b).max(initial=0.0)), a.tobytes() == b.tobytes())
