"""Snapshots of a run's steps that stay in a keeper's memory for its branches, while the run trains on.

A region's two halves are written over within two steps. What is written to storage is copied before, and of a step that
branches begin with, that copy stays: it costs no time, and its memory until the step is released.
"""

import threading
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from workers.snapshots.kept import KeptShard
from workers.snapshots.messages import Read


class HeldSteps:
    """The copies of one keeper, by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: frozenset[int] = frozenset()
        self._shards: dict[str, tuple[KeptShard, np.ndarray]] = {}
        """By the path under which they are read; it is no file."""

    def want(self, steps: Collection[int]) -> None:
        """Let these steps stay, from now on."""
        with self._lock:
            self._wanted = frozenset(steps)

    def add(self, shard: KeptShard, values: np.ndarray) -> None:
        """Let an agreed snapshot of a rank stay, if its step is to: fp32 values that nobody changes any more."""
        path = f"held/{shard.generation}/{shard.rank}/{shard.step}"
        with self._lock:
            if shard.step in self._wanted:
                self._shards[path] = replace(shard, path=path, half=0, notes={}), values

    def of(self, generation: int, step: int) -> list[KeptShard]:
        """Return what stays of a step, as a generation has saved it; what others have of it goes."""
        with self._lock:
            for path, (shard, _) in list(self._shards.items()):
                if shard.step == step and shard.generation != generation:
                    del self._shards[path]
            return [shard for shard, _ in self._shards.values() if shard.step == step]

    def read(self, message: Read) -> memoryview | None:
        """Return the values that are asked for; None where that is nothing that stays here."""
        with self._lock:
            found = self._shards.get(message.path)
        if found is None:
            return None
        return found[1][message.offset : message.offset + message.count].data.cast("B")

    def release(self, step: int) -> None:
        """Let go of a step."""
        with self._lock:
            self._wanted -= {step}
            self._shards = {path: one for path, one in self._shards.items() if one[0].step != step}
