"""Which interval of which parameter lies where. Pure Python: no torch, no numpy.

ZeRO-1 lays the parameters of a group end to end, pads the end and cuts the whole into one equal partition per rank.
This map serves the optimizer's hook, checkpoints and every change of world size: state is keyed by parameter name and
offset, never by rank, and moving it between world sizes is the arithmetic of intervals below.

Invariant: the fragments of all ranks tile every parameter exactly once.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 2
"""DeepSpeed pads a group to a multiple of this many elements per rank (`nccl_start_alignment_factor`)."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """`length` elements of the flattened parameter `name`, from `start` on, which lie at `offset` of a buffer."""

    name: str
    start: int
    length: int
    offset: int

    @property
    def stop(self) -> int:
        """One past the fragment's last element in the parameter."""
        return self.start + self.length

    def __str__(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy `length` elements from `source_offset` of buffer `source` to `target_offset`."""

    source: int
    source_offset: int
    target_offset: int
    length: int


def partition_size(total: int, world_size: int) -> int:
    """Return the elements per rank of a group of `total` elements."""
    return -(-total // (ALIGNMENT * world_size)) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """A parameter group laid out flat over `world_size` ranks.

    `names` and `numels` are parallel; `starts[i]` is the flat offset of parameter i.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    world_size: int
    starts: tuple[int, ...]
    partition: int

    @staticmethod
    def of(names: Sequence[str], numels: Sequence[int], world_size: int) -> "GroupLayout":
        """Lay the parameters out in the given order."""
        starts, total = [], 0
        for numel in numels:
            starts.append(total)
            total += numel
        return GroupLayout(tuple(names), tuple(numels), world_size, tuple(starts), partition_size(total, world_size))

    def owner(self, flat: int) -> int:
        """Return the rank in whose partition the flat offset lies."""
        return flat // self.partition

    def fragments(self, rank: int) -> list[Fragment]:
        """Return what lies in the rank's partition, in order; `offset` counts from the partition's start."""
        begin, end = rank * self.partition, (rank + 1) * self.partition
        found = []
        first = max(0, bisect_right(self.starts, begin) - 1)
        for name, start, numel in zip(self.names[first:], self.starts[first:], self.numels[first:], strict=True):
            if start >= end:
                break
            low, high = max(start, begin), min(start + numel, end)
            if low < high:
                found.append(Fragment(name, low - start, high - low, low - begin))
        return found

    def sharing(self, rank: int, other: "GroupLayout") -> range:
        """Return the ranks of the group's other layout whose partitions have anything of what this one's rank has."""
        begin = rank * self.partition
        end = min(begin + self.partition, self.starts[-1] + self.numels[-1]) if self.names else 0
        return range(other.owner(begin), other.owner(end - 1) + 1) if begin < end else range(0)

    def split(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Cut the flat interval at partition boundaries into `(rank, offset in the partition, length)`."""
        pieces = []
        while start < stop:
            rank = self.owner(start)
            length = min(stop, (rank + 1) * self.partition) - start
            pieces.append((rank, start - rank * self.partition, length))
            start += length
        return pieces


def copies(have: Iterable[tuple[int, Fragment]], want: Iterable[Fragment]) -> tuple[list[Copy], list[Fragment]]:
    """Plan how to fill the wanted fragments from those at hand.

    Args:
        have: pairs of a buffer's number and a fragment that lies in it.
        want: fragments to fill; their offsets count in the target buffer.

    Returns:
        One copy for each overlap, and what no buffer has, both in the order of `want`.
    """
    by_name: dict[str, list[tuple[int, Fragment]]] = {}
    for source, fragment in have:
        by_name.setdefault(fragment.name, []).append((source, fragment))
    for held in by_name.values():
        held.sort(key=lambda pair: pair[1].start)

    plan, missing = [], []
    for target in want:
        at, shift = target.start, target.offset - target.start
        for source, fragment in by_name.get(target.name, []):
            if at < fragment.stop and fragment.start < target.stop:
                if at < fragment.start:
                    missing.append(Fragment(target.name, at, fragment.start - at, at + shift))
                    at = fragment.start
                length = min(fragment.stop, target.stop) - at
                plan.append(Copy(source, fragment.offset + at - fragment.start, at + shift, length))
                at += length
        if at < target.stop:
            missing.append(Fragment(target.name, at, target.stop - at, at + shift))
    return plan, missing
