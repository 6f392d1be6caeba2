"""What a checkpoint consists of: an immutable JSON file that names every shard, its hash and what lies in it.

State is keyed by parameter name and offset. A reader trusts a manifest only if the run log gave it the manifest's hash,
and a shard only if the manifest gave it the shard's.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from workers.errors import StorageError
from workers.storage import Store

FORMAT = "raymuon-checkpoint-1"
WEIGHT, BUFFER = "weight", "buffer"
"""The kinds of master weights and of replicated tensors; the others are the optimizer's state keys."""


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
            StorageError: an element is missing or there twice, or a weight has no optimizer state.
        """
        held: dict[tuple[str, str], list[Entry]] = {}
        for shard in self.shards:
            for entry in shard.entries:
                held.setdefault((entry.kind, entry.name), []).append(entry)
        for (kind, name), entries in held.items():
            at = 0
            for entry in sorted(entries, key=lambda entry: entry.start):
                if entry.start != at:
                    break
                at += entry.length
            if at != prod(self.shapes[name]) or at != sum(entry.length for entry in entries):
                raise StorageError(f"step {self.step}: the shards do not hold {kind} of {name} exactly once")
        if missing := set(self.shapes) - {name for _, name in held}:
            raise StorageError(f"step {self.step}: nothing in the shards of {', '.join(sorted(missing))}")
        with_state = {name for kind, name in held if kind not in (WEIGHT, BUFFER)}
        if bare := {name for kind, name in held if kind == WEIGHT} - with_state:
            raise StorageError(f"step {self.step}: no optimizer state in the shards of {', '.join(sorted(bare))}")
