"""Who orthogonalizes what, and which pieces travel for it. Pure Python: no torch, no numpy.

A matrix that lies whole in one partition is orthogonalized there. One that straddles a boundary is orthogonalized by
one of its holders, its owner: the others send their pieces and get their slices of the result back. Every rank computes
the same plan from the same layout, so no rank has to be told.

Invariant: every matrix of the group is orthogonalized exactly once across the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from optim.layout import GroupLayout


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix `[rows, columns]` of a group, from the flat offset `start` on."""

    start: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Local:
    """A matrix that lies whole in a partition, at `offset`."""

    offset: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of straddling matrix `matrix`: `length` elements at `offset` of rank `holder`'s partition.

    `position` is the part's offset in the flattened matrix.
    """

    matrix: int
    holder: int
    offset: int
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class Straddler:
    """A matrix over several partitions, orthogonalized by `owner`; `pieces` are in order and tile it."""

    rows: int
    columns: int
    owner: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class OrthogonalizePlan:
    """The plan of one group: `local[rank]` and all straddlers, in flat order."""

    local: tuple[tuple[Local, ...], ...]
    straddlers: tuple[Straddler, ...]

    def sent(self, rank: int, peer: int) -> list[Piece]:
        """Pieces that `rank` sends to `peer` for orthogonalization, in the order in which they are packed.

        The same pieces of the result travel back, so `sent(peer, rank)` is what `rank` answers to `peer`.
        """
        if rank == peer:
            return []
        return [
            piece
            for matrix in self.straddlers
            if matrix.owner == peer
            for piece in matrix.pieces
            if piece.holder == rank
        ]


def matrices_of(layout: GroupLayout, shapes: Sequence[tuple[int, int, int]]) -> list[Matrix]:
    """List the group's matrices; `shapes[i]` is `(E, A, B)` of parameter i: E matrices of A rows and B columns."""
    return [
        Matrix(start + index * rows * columns, rows, columns)
        for start, (count, rows, columns) in zip(layout.starts, shapes, strict=True)
        for index in range(count)
    ]


def plan_orthogonalization(layout: GroupLayout, matrices: Sequence[Matrix]) -> OrthogonalizePlan:
    """Assign every matrix to one rank.

    A straddler goes to the holder of most of its elements, so that the least travels; a tie goes to the holder with the
    fewest elements to orthogonalize so far, then to the lower rank.
    """
    local: list[list[Local]] = [[] for _ in range(layout.world_size)]
    load = [0] * layout.world_size
    straddling: list[tuple[Matrix, list[tuple[int, int, int]]]] = []
    for matrix in matrices:
        parts = layout.split(matrix.start, matrix.start + matrix.numel)
        if len(parts) == 1:
            rank, offset, _ = parts[0]
            local[rank].append(Local(offset, matrix.rows, matrix.columns))
            load[rank] += matrix.numel
        else:
            straddling.append((matrix, parts))

    straddlers = []
    for index, (matrix, parts) in enumerate(straddling):
        owner = min(parts, key=lambda part: (-part[2], load[part[0]], part[0]))[0]
        load[owner] += matrix.numel
        pieces, position = [], 0
        for rank, offset, length in parts:
            pieces.append(Piece(index, rank, offset, position, length))
            position += length
        straddlers.append(Straddler(matrix.rows, matrix.columns, owner, tuple(pieces)))
    return OrthogonalizePlan(tuple(map(tuple, local)), tuple(straddlers))
