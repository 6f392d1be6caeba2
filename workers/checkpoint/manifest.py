"""What a checkpoint consists of: an immutable JSON file that names every shard, its hash and what lies in it.

State is keyed by parameter name and offset. A reader trusts a manifest only if the run log gave it the manifest's hash,
and a shard only if the manifest gave it the shard's.
"""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from workers.errors import StorageError
from workers.storage import Store

FORMAT = "raymuon-checkpoint-1"
BUFFER = "buffer"
"""The kind of replicated tensors; the others are `weight` and the optimizer's state keys."""


@dataclass(frozen=True, slots=True)
class Entry:
    """`length` elements of the flattened tensor (`kind`, `name`) from `start` on, fp32."""

    kind: str
    name: str
    start: int
    length: int

    @property
    def key(self) -> str:
        """The tensor's key in its safetensors file."""
        return f"{self.kind}/{self.name}/{self.start}"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One safetensors file: where it is in the run's folder, its size in bytes, its hash, and its entries."""

    path: str
    size: int
    sha256: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint.

    `identity` holds what a resumed run must share (model, optimizer, data, seed, batch); `counters` what it goes on
    from; `shapes` every tensor's shape by parameter or buffer name.
    """

    run_id: str
    attempt: int
    step: int
    world_size: int
    identity: dict[str, Any]
    counters: dict[str, int]
    shapes: dict[str, list[int]]
    shards: tuple[ShardFile, ...]

    @property
    def path(self) -> str:
        """Where the manifest goes; an attempt writes each step's at most once."""
        return f"manifests/{self.step:08d}-{self.attempt:04d}.json"

    def encode(self) -> bytes:
        """Return the file's content."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @staticmethod
    def read(store: Store, path: str, sha256: str) -> "Manifest":
        """Read a manifest of the run's folder, and check it against the hash in the run log.

        Raises:
            StorageError: it is missing, damaged, or of a format that this version does not know.
        """
        data = store.read(path)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(f"{store.url}/{path}: damaged (its SHA-256 is not the run log's)")
        fields = json.loads(data)
        if (found := fields.pop("format")) != FORMAT:
            raise StorageError(f"{store.url}/{path}: checkpoint format {found!r}, this version reads {FORMAT!r}")
        shards = tuple(
            ShardFile(**{**shard, "entries": tuple(Entry(**entry) for entry in shard["entries"])})
            for shard in fields.pop("shards")
        )
        return Manifest(**fields, shards=shards)

    def check_inventory(self) -> None:
        """Check that the shards hold every element of every tensor exactly once, before anything is committed.

        Raises:
            StorageError: an element is missing or there twice.
        """
        held: Counter[tuple[str, str]] = Counter()
        for shard in self.shards:
            for entry in shard.entries:
                held[entry.kind, entry.name] += entry.length
        for (kind, name), elements in held.items():
            if elements != prod(self.shapes[name]):
                raise StorageError(f"step {self.step}: {kind} of {name} has {elements} elements in the shards")
        if missing := set(self.shapes) - {name for _, name in held}:
            raise StorageError(f"step {self.step}: nothing in the shards of {', '.join(sorted(missing))}")
