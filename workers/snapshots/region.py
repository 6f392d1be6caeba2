"""The memory in which one rank's snapshots lie: two halves, so that one is whole at any moment.

A worker writes its shard into the half that is not the newest agreed one, *seals* it, and, once the boundary has told
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

HALVES = 2
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
    def values(self) -> int:
        """Bytes of both: a snapshot's, but for its notes."""
        return self.shard + self.replicated

    @property
    def half(self) -> int:
        """Bytes of one half, in whole pages."""
        return -(-(_HEAD_BYTES + self.values + NOTES_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


class Region:
    """A mapped region."""

    def __init__(self, descriptor: int, size: RegionSize) -> None:
        self.size = size
        self._map = mmap.mmap(descriptor, HALVES * size.half)
        self._view = memoryview(self._map)

    @staticmethod
    def create(size: RegionSize) -> "tuple[Region, str]":
        """Make a region; return it and the path at which other processes of the node find it while this one lives."""
        descriptor = os.memfd_create("raymuon-snapshots", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, HALVES * size.half)
            region = Region(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        region._descriptor = descriptor
        for half in range(HALVES):
            region.clear(half)
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

    def sealed(self, half: int) -> int:
        """Return the step whose shard the half holds, or NONE."""
        return self._marks(half)[0]

    def agreed(self, half: int) -> int:
        """Return the step that all ranks agreed on in this half, or NONE."""
        return self._marks(half)[1]

    def clear(self, half: int) -> None:
        """Make the half hold nothing, before anything in it changes."""
        self._mark(half, NONE, NONE, 0)

    def seal(self, half: int, step: int) -> None:
        """Mark the shard as whole."""
        self._mark(half, step, NONE, 0)

    def agree(self, half: int, notes: dict[str, Any]) -> None:
        """Put down the notes and mark the sealed step as agreed."""
        encoded = json.dumps(notes).encode()
        if len(encoded) > NOTES_BYTES:
            raise ValueError(f"notes of {len(encoded)} bytes; there is room for {NOTES_BYTES}")
        begin = self._begin(half) + self.size.values
        self._view[begin : begin + len(encoded)] = encoded
        step = self.sealed(half)
        self._mark(half, step, step, len(encoded))

    def notes(self, half: int) -> dict[str, Any]:
        """Return the notes of an agreed half."""
        begin = self._begin(half) + self.size.values
        return json.loads(bytes(self._view[begin : begin + self._marks(half)[2]]))

    def floats(self, half: int) -> np.ndarray:
        """Return the half's fp32 values, the shard's first and then the replicated ones; a live view."""
        begin = self._begin(half)
        return np.frombuffer(self._view[begin : begin + self.size.values], dtype=np.float32)

    def content(self, half: int) -> memoryview:
        """Return the bytes of an agreed half that a copy has to have: values, then notes."""
        begin = self._begin(half)
        return self._view[begin : begin + self.size.values + self._marks(half)[2]]

    def target(self, half: int, size: int) -> memoryview:
        """Return the place for `size` bytes of another region's `content`."""
        return self._view[self._begin(half) : self._begin(half) + size]

    def settle(self, half: int, step: int, size: int) -> None:
        """Mark what was put into `target` as whole and agreed."""
        self._mark(half, step, step, size - self.size.values)

    def spare(self) -> int:
        """Return the half that may be overwritten: the one that does not hold the newest agreed step."""
        return min(range(HALVES), key=self.agreed)

    def _begin(self, half: int) -> int:
        return half * self.size.half + _HEAD_BYTES

    def _marks(self, half: int) -> tuple[int, int, int]:
        return _MARKS.unpack_from(self._view, half * self.size.half)

    def _mark(self, half: int, *marks: int) -> None:
        _MARKS.pack_into(self._view, half * self.size.half, *marks)
