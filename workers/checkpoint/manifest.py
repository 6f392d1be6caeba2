"""What a checkpoint consists of: an immutable JSON file that names every shard, its hash and what lies in it.

State is keyed by parameter name and offset. A reader trusts a manifest only if the run log gave it the manifest's hash,
and a shard only if the manifest gave it the shard's.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

from workers.checkpoint.lineage import Lineage
from workers.common.errors import DamagedError, NotFoundError, StorageError
from workers.common.storage import Store

FORMAT = "raymuon-checkpoint-2"
CHUNK = 1 << 20
"""Bytes under one hash: a range of a shard is verified without the rest of it."""
SHARDS, MANIFESTS = "shards", "manifests"
"""Folders of a run."""
WEIGHT, BUFFER = "weight", "buffer"
"""The kinds of master weights and of replicated tensors; the others are the optimizer's state keys."""
LINEAGE = "lineage"
"""The key of `identity` under which it is stored: earlier versions, which read the same format, take no new key beside
it, and of `identity` only what they know."""


@dataclass(frozen=True, slots=True)
class TensorSlice:
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
    """One safetensors file of a checkpoint.

    `path` in the run's folder; `size` in bytes; `header`: the bytes before the first tensor; `chunks`: the SHA-256 of
    every `CHUNK` bytes, the last of what is left; `entries` in the order in which they lie, without gaps.
    """

    path: str
    size: int
    header: int
    chunks: tuple[str, ...]
    entries: tuple[TensorSlice, ...]

    def encode(self) -> dict[str, Any]:
        """Return the manifest's form; entries are lists, of which there are thousands."""
        entries = [[entry.kind, entry.name, entry.start, entry.length] for entry in self.entries]
        return {
            "path": self.path,
            "size": self.size,
            "header": self.header,
            "chunks": list(self.chunks),
            "entries": entries,
        }

    @staticmethod
    def decode(fields: dict[str, Any]) -> "ShardFile":
        """Read the manifest's form."""
        entries = tuple(TensorSlice(*entry) for entry in fields["entries"])
        return ShardFile(**{**fields, "chunks": tuple(fields["chunks"]), "entries": entries})

    @property
    def offsets(self) -> Iterator[int]:
        """Yield where each entry's bytes begin in the file."""
        at = self.header
        for entry in self.entries:
            yield at
            at += 4 * entry.length


@dataclass(frozen=True)
class Manifest:
    """A checkpoint.

    `identity` holds what a resumed run must share (model, optimizer, data, seed, batch); `counters` what it goes on
    from; `shapes` every tensor's shape by parameter or buffer name.
    """

    run_id: str
    attempt: int
    generation: int
    step: int
    world_size: int
    identity: dict[str, Any]
    counters: dict[str, int]
    shapes: dict[str, list[int]]
    shards: tuple[ShardFile, ...]
    lineage: Lineage | None = None
    """What it comes from; None where an earlier version has written it."""
    sha256: str = field(default="", compare=False)
    """Of the file that it was read from; empty where it was not read."""

    @property
    def path(self) -> str:
        """Where the manifest goes; a generation of an attempt writes each step's at most once."""
        return f"{MANIFESTS}/{place_of(self.step, self.attempt, self.generation)}.json"

    @property
    def size(self) -> int:
        """Bytes in all shards."""
        return sum(shard.size for shard in self.shards)

    def encode(self) -> bytes:
        """Return the file's content."""
        # The shards go their own way: `asdict` takes a second for those of a thousand ranks.
        fields = {**asdict(replace(self, shards=())), "shards": [shard.encode() for shard in self.shards]}
        del fields["sha256"], fields["lineage"]
        if self.lineage is not None:
            fields["identity"][LINEAGE] = self.lineage.encode()
        return json.dumps({"format": FORMAT, **fields}).encode()

    @staticmethod
    def read(store: Store, path: str, sha256: str) -> "Manifest":
        """Read a manifest of the run's folder, and check it against the hash in the run log.

        Raises:
            StorageError: it is missing, damaged, or of a format that this version does not know.
        """
        try:
            data = store.read(path)
        except NotFoundError as error:
            raise DamagedError(f"{store.url}/{path}: missing") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedError(f"{store.url}/{path}: damaged (its SHA-256 is not the run log's)")
        fields = json.loads(data)
        if (found := fields.pop("format")) != FORMAT:
            raise StorageError(f"{store.url}/{path}: checkpoint format {found!r}, this version reads {FORMAT!r}")
        shards, lineage = tuple(ShardFile.decode(shard) for shard in fields["shards"]), None
        if stored := fields["identity"].pop(LINEAGE, None):
            with suppress(ValueError):  # Another version's: no reason not to read the rest.
                lineage = Lineage.read(stored)
        return Manifest(**{**fields, "shards": shards, "lineage": lineage, "sha256": sha256})

    def check_inventory(self) -> None:
        """Check that the shards hold every element of every tensor exactly once, before anything is committed.

        Raises:
            StorageError: an element is missing or there twice, or a weight has no optimizer state.
        """
        held: dict[tuple[str, str], list[TensorSlice]] = {}
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
        if self.step == 0:
            return  # Before the first step an optimizer has no state.
        if bare := {name for kind, name in held if kind == WEIGHT} - with_state:
            raise StorageError(f"step {self.step}: no optimizer state in the shards of {', '.join(sorted(bare))}")


def place_of(step: int, attempt: int, generation: int) -> str:
    """Return what the names of a checkpoint's files begin with."""
    return f"{step:08d}-{attempt:04d}-{generation:04d}"


def parse_place(path: str) -> tuple[int, int, int] | None:
    """Return step, attempt and generation of a file in SHARDS or MANIFESTS; None for a foreign one."""
    found = re.match(rf"(?:{SHARDS}|{MANIFESTS})/(\d{{8,}})-(\d{{4,}})-(\d{{4,}})\b", path)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None
