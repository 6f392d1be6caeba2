"""The memory in which one rank's snapshots lie: two slots, so that one is whole at any moment.

A worker writes its shard into the slot that is not the newest agreed one, *seals* it, and, once the boundary has told
that every rank has sealed its own, writes what is replicated and marks it *agreed*. Both marks are in the memory
itself: whatever a process had done when it died can be read there, without asking it.

A region is an anonymous file (memfd). It belongs to the keeper's process, counts against no shared-memory file system
(containers often have 64 MB of it), and is gone with the last process that maps it: nothing is ever left behind.
"""

import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SLOTS = 2
NONE = -1
"""No step."""
_MARKS = struct.Struct("<qqq")
"""Sealed step, agreed step, bytes of the notes."""
_HEAD_BYTES = 64
NOTES_BYTES = 1 << 20
"""Room for the notes (counters, and the rows that the driver may not have yet); only what is written takes memory."""


@dataclass(frozen=True, slots=True)
class RegionSize:
    """Bytes of a rank's own shard and of the replicated tensors."""

    shard: int
    replicated: int

    @property
    def slot(self) -> int:
        """Bytes of one slot, in whole pages."""
        return -(-(_HEAD_BYTES + self.shard + self.replicated + NOTES_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


class Region:
    """A mapped region."""

    def __init__(self, descriptor: int, size: RegionSize) -> None:
        self.size = size
        self._map = mmap.mmap(descriptor, SLOTS * size.slot)
        self._view = memoryview(self._map)

    @staticmethod
    def create(size: RegionSize) -> "tuple[Region, str]":
        """Make a region; return it and the path at which other processes of the node find it while this one lives."""
        descriptor = os.memfd_create("raymuon-snapshots", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, SLOTS * size.slot)
        region = Region(descriptor, size)
        region._descriptor = descriptor
        for slot in range(SLOTS):
            region.clear(slot)
        return region, f"/proc/{os.getpid()}/fd/{descriptor}"

    @staticmethod
    def attach(path: str, size: RegionSize) -> "Region":
        """Map a region that a keeper of this node has made."""
        with Path(path).open("r+b") as file:
            return Region(file.fileno(), size)

    _descriptor: int | None = None

    def close(self) -> None:
        """Give the keeper's file up; the memory goes when nobody maps it any more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def sealed(self, slot: int) -> int:
        """Return the step whose shard the slot holds, or NONE."""
        return self._marks(slot)[0]

    def agreed(self, slot: int) -> int:
        """Return the step that all ranks agreed on in this slot, or NONE."""
        return self._marks(slot)[1]

    def clear(self, slot: int) -> None:
        """Make the slot hold nothing, before anything in it changes."""
        self._mark(slot, NONE, NONE, 0)

    def seal(self, slot: int, step: int) -> None:
        """Mark the shard as whole."""
        self._mark(slot, step, NONE, 0)

    def agree(self, slot: int, notes: dict[str, Any]) -> None:
        """Put down the notes and mark the sealed step as agreed."""
        encoded = json.dumps(notes).encode()
        if len(encoded) > NOTES_BYTES:
            raise ValueError(f"notes of {len(encoded)} bytes; there is room for {NOTES_BYTES}")
        begin = self._begin(slot) + self.size.shard + self.size.replicated
        self._view[begin : begin + len(encoded)] = encoded
        step = self.sealed(slot)
        self._mark(slot, step, step, len(encoded))

    def notes(self, slot: int) -> dict[str, Any]:
        """Return the notes of an agreed slot."""
        begin = self._begin(slot) + self.size.shard + self.size.replicated
        return json.loads(bytes(self._view[begin : begin + self._marks(slot)[2]]))

    def floats(self, slot: int) -> np.ndarray:
        """Return the slot's fp32 values, the shard's first and then the replicated ones; a live view."""
        begin = self._begin(slot)
        return np.frombuffer(self._view[begin : begin + self.size.shard + self.size.replicated], dtype=np.float32)

    def content(self, slot: int) -> memoryview:
        """Return the bytes of an agreed slot that a copy has to have: values, then notes."""
        begin = self._begin(slot)
        return self._view[begin : begin + self.size.shard + self.size.replicated + self._marks(slot)[2]]

    def target(self, slot: int, size: int) -> memoryview:
        """Return the place for `size` bytes of another region's `content`."""
        return self._view[self._begin(slot) : self._begin(slot) + size]

    def settle(self, slot: int, step: int, size: int) -> None:
        """Mark what was put into `target` as whole and agreed."""
        self._mark(slot, step, step, size - self.size.shard - self.size.replicated)

    def spare(self) -> int:
        """Return the slot that may be overwritten: the one that does not hold the newest agreed step."""
        return min(range(SLOTS), key=self.agreed)

    def _begin(self, slot: int) -> int:
        return slot * self.size.slot + _HEAD_BYTES

    def _marks(self, slot: int) -> tuple[int, int, int]:
        return _MARKS.unpack_from(self._view, slot * self.size.slot)

    def _mark(self, slot: int, *marks: int) -> None:
        _MARKS.pack_into(self._view, slot * self.size.slot, *marks)
