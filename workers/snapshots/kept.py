"""What keepers have, as the driver learns it and workers are told it. Without torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optim.layout import Fragment, GroupLayout
from workers.checkpoint.manifest import BUFFER
from workers.common.wire import Address
from workers.snapshots.region import RegionSize


@dataclass(frozen=True, slots=True)
class ShardMap:
    """What lies where in one rank's snapshot at one world size; offsets and sizes in fp32 values.

    The shard comes first: the flat partitions of the optimizer's groups, one after the other. Then what is replicated.
    """

    shard: int
    replicated: int
    fragments: tuple[tuple[str, Fragment], ...]
    """Kind and fragment; a fragment's `offset` counts from the snapshot's beginning."""

    @staticmethod
    def of(
        layouts: Iterable[tuple[GroupLayout, Sequence[str]]], replicated: Mapping[str, int], rank: int
    ) -> "ShardMap":
        """Return that of a rank.

        Args:
            layouts: each group's, and the kinds of its flat tensors.
            replicated: elements of each replicated tensor.
            rank: whose.
        """
        found: list[tuple[str, Fragment]] = []
        at = 0
        for layout, kinds in layouts:
            for kind in kinds:
                found += [(kind, replace(f, offset=at + f.offset)) for f in layout.fragments(rank)]
                at += layout.partition
        shard = at
        for name, elements in replicated.items():
            found.append((BUFFER, Fragment(name, 0, elements, at)))
            at += elements
        return ShardMap(shard, at - shard, tuple(found))

    @property
    def size(self) -> RegionSize:
        """Bytes that a region needs for it."""
        return RegionSize(4 * self.shard, 4 * self.replicated)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptShard:
    """One keeper's copy of one rank's part of the snapshot of a step."""

    generation: int
    rank: int
    world_size: int
    step: int
    agreed: bool
    """False: this rank did not live to see the boundary. The step counts if any other copy of it is agreed."""
    keeper: Address
    path: str
    """Where the region is found on the keeper's node."""
    half: int
    """Of the region's two snapshots."""
    size: RegionSize
    notes: dict[str, Any] = field(default_factory=dict)
    """Of an agreed copy: `counters`, and `rows`, the reports that the driver may not have yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A step to go on from, out of keepers' memory: at least one copy of every rank's part, unless it is `saved`."""

    generation: int
    step: int
    world_size: int
    counters: dict[str, int]
    shards: tuple[KeptShard, ...]
    saved: bool = False
    """Some ranks' parts are in no keeper any more, but this very snapshot is the newest checkpoint."""
