"""`raymuon checkpoints`: list what a run has committed, show one, compare two tensor by tensor."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.run_log import RunLog
from workers.checkpoint.manifest import Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.errors import ConfigError, StorageError
from workers.storage import Store, absolute_url


def split_step(url: str) -> tuple[str, int | None]:
    """Split `URL@STEP` into the run's folder and the step; without a step the newest is meant."""
    base, at, step = url.rpartition("@")
    return (base, int(step)) if at and step.isdigit() else (url, None)


def list_checkpoints(url: str) -> list[dict[str, Any]]:
    """Return every commit of the run at `url`, or of all runs under it, oldest first.

    Raises:
        StorageError: nothing is there.
    """
    store = Store(absolute_url(url.rstrip("/")))
    if not store.exists():
        raise StorageError(f"{url}: no such folder or bucket")
    runs = [store] if store.names("log") else [store.child(name) for name in store.names("")]
    rows = []
    for run in runs:
        for commit in RunLog(run).commits:
            manifest = Manifest.read(run, commit.manifest, commit.sha256)
            rows.append(
                {
                    "run_id": manifest.run_id,
                    "step": commit.step,
                    "attempt": commit.attempt,
                    "time": commit.time,
                    "world_size": manifest.world_size,
                    "tokens": manifest.counters["tokens"],
                    "bytes": sum(shard.size for shard in manifest.shards),
                    "url": f"{run.url}@{commit.step}",
                }
            )
    return rows


def open_checkpoint(url: str) -> CheckpointReader:
    """Open the checkpoint at `URL[@STEP]`.

    Raises:
        ConfigError: there is none.
    """
    base, step = split_step(url)
    store = Store(absolute_url(base))
    manifest = RunLog(store).manifest(step)
    if manifest is None:
        which = "no committed checkpoint" if step is None else f"no committed checkpoint of step {step}"
        raise ConfigError(f"{url}: {which}; see: raymuon checkpoints ls {base}")
    return CheckpointReader(store, manifest)


def show(url: str) -> dict[str, Any]:
    """Return what a checkpoint holds: its identity, counters and tensors."""
    reader = open_checkpoint(url)
    manifest = reader.manifest
    return {
        "run_id": manifest.run_id,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "world_size": manifest.world_size,
        "identity": manifest.identity,
        "counters": manifest.counters,
        "shards": [{"path": s.path, "size": s.size, "sha256": s.sha256} for s in manifest.shards],
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


def diff(first: str, second: str) -> list[TensorDifference]:
    """Compare two checkpoints, tensor by tensor, whatever the world sizes at which they were saved."""
    left, right = open_checkpoint(first), open_checkpoint(second)
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
