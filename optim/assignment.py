"""Who orthogonalizes what, and which pieces travel for it. Pure Python: no torch, no numpy.

A matrix that lies whole in one partition is orthogonalized there, together with others of its shape. One that straddles
a boundary is orthogonalized by one of its holders, its owner: the others send their pieces and get their slices of the
result back. Every rank computes the same plan from the same layout, so no rank has to be told.

Invariant: every matrix of the group is orthogonalized exactly once across the ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from optim.layout import GroupLayout
from optim.mup import UNSCALED, Step


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix `[rows, columns]` of a group, from the flat offset `start` on."""

    start: int
    rows: int
    columns: int
    step: Step = UNSCALED
    """What the width makes of its rate and decay."""

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Batch:
    """`count` matrices of one shape that lie whole in a partition, `stride` elements apart, the first at `offset`.

    So they are one strided view `[count, rows, columns]` of the shard, and nothing has to be copied.
    """

    offset: int
    stride: int
    count: int
    rows: int
    columns: int
    step: Step = UNSCALED


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
    step: Step = UNSCALED


@dataclass(frozen=True, slots=True)
class OrthogonalizePlan:
    """The plan of one group: each rank's batches and all straddlers, in flat order."""

    local: tuple[tuple[Batch, ...], ...]
    straddlers: tuple[Straddler, ...]
    _routes: dict[tuple[int, int], list[Piece]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for matrix in self.straddlers:
            for piece in matrix.pieces:
                if piece.holder != matrix.owner:
                    self._routes.setdefault((piece.holder, matrix.owner), []).append(piece)

    @property
    def numel(self) -> int:
        """Elements of all matrices."""
        return sum(rows * columns for rank in range(len(self.local)) for rows, columns in self.matrices(rank))

    def sent(self, rank: int, peer: int) -> list[Piece]:
        """Pieces that `rank` sends to `peer` for orthogonalization, in the order in which they are packed.

        The same pieces of the result travel back, so `sent(peer, rank)` is what `rank` answers to `peer`.
        """
        return self._routes.get((rank, peer), [])

    def elements_sent(self) -> list[int]:
        """Return how many elements each rank sends in a step: pieces to their owners, and results back."""
        sent = [0] * len(self.local)
        for (holder, owner), pieces in self._routes.items():
            length = sum(piece.length for piece in pieces)
            sent[holder] += length
            sent[owner] += length
        return sent

    def figures(self, partition: int, operations: Callable[[int, int], int], itemsize: int, wire: int) -> "PlanFigures":
        """Return what the plan comes to.

        Args:
            partition: elements of the group's on each rank.
            operations: of orthogonalizing a matrix of so many rows and columns.
            itemsize: bytes of a weight in the parameters' all-gather.
            wire: bytes of an element of a straddler on its way.
        """
        gpus, sent = len(self.local), self.elements_sent()
        work = [sum(operations(rows, columns) for rows, columns in self.matrices(rank)) for rank in range(gpus)]
        gathered = itemsize * partition * (gpus - 1)
        return PlanFigures(
            gpus=gpus,
            matrices=sum(1 for rank in range(gpus) for _ in self.matrices(rank)),
            straddlers=len(self.straddlers),
            bytes_each_way=wire * sum(sent) // 2,
            worst_share_of_all_gather=wire * max(sent) / gathered if gathered else 0.0,
            operations=sum(work),
            worst_operations=max(work),
        )

    def matrices(self, rank: int) -> Iterator[tuple[int, int]]:
        """Yield rows and columns of every matrix that `rank` orthogonalizes."""
        for batch in self.local[rank]:
            yield from [(batch.rows, batch.columns)] * batch.count
        yield from ((matrix.rows, matrix.columns) for matrix in self.straddlers if matrix.owner == rank)


@dataclass(frozen=True)
class PlanFigures:
    """How a plan shares a group's matrices out over `gpus` ranks."""

    gpus: int
    matrices: int
    straddlers: int
    bytes_each_way: int
    """Of straddlers' pieces to their owners, all ranks together; as many come back."""
    worst_share_of_all_gather: float
    """What the busiest rank sends for straddlers, both ways, over what it sends in the parameters' all-gather."""
    operations: int
    """Of Newton-Schulz in a step, all ranks together."""
    worst_operations: int
    """Of the busiest rank."""

    @property
    def imbalance(self) -> float:
        """The busiest rank's operations over the mean."""
        return self.worst_operations * self.gpus / self.operations

    def as_dict(self) -> dict[str, float]:
        """Return all of it as plain values."""
        return {**asdict(self), "imbalance": self.imbalance}


def matrices_of(
    layout: GroupLayout,
    shapes: Sequence[Sequence[tuple[int, int]]],
    step: Callable[[str, int, int], Step] = lambda name, rows, columns: UNSCALED,
) -> list[Matrix]:
    """List the group's matrices.

    Args:
        layout: of the group.
        shapes: rows and columns of those in each parameter, as they lie there.
        step: factors of a matrix of so many rows and columns in a parameter.
    """
    found = []
    for name, start, held in zip(layout.names, layout.starts, shapes, strict=True):
        at = start
        for rows, columns in held:
            found.append(Matrix(at, rows, columns, step(name, rows, columns)))
            at += rows * columns
    return found


def plan_orthogonalization(
    layout: GroupLayout,
    matrices: Sequence[Matrix],
    cost: Callable[[int, int], int] = lambda rows, columns: rows * columns,
) -> OrthogonalizePlan:
    """Assign every matrix to one rank.

    A straddler goes to the holder of most of its elements, so that the least travels; a tie goes to the holder with the
    least to do so far, then to the lower rank.

    Args:
        layout: of the group.
        matrices: of the group, in flat order.
        cost: of orthogonalizing a matrix of so many rows and columns.
    """
    local: list[list[Matrix]] = [[] for _ in range(layout.world_size)]
    load = [0] * layout.world_size
    straddling: list[tuple[Matrix, list[tuple[int, int, int]]]] = []
    for matrix in matrices:
        parts = layout.split(matrix.start, matrix.start + matrix.numel)
        if len(parts) == 1:
            rank, offset, _ = parts[0]
            local[rank].append(replace(matrix, start=offset))
            load[rank] += cost(matrix.rows, matrix.columns)
        else:
            straddling.append((matrix, parts))

    straddlers = []
    for index, (matrix, parts) in enumerate(straddling):
        owner = min(parts, key=lambda part: (-part[2], load[part[0]], part[0]))[0]
        load[owner] += cost(matrix.rows, matrix.columns)
        pieces, position = [], 0
        for rank, offset, length in parts:
            pieces.append(Piece(index, rank, offset, position, length))
            position += length
        straddlers.append(Straddler(matrix.rows, matrix.columns, owner, tuple(pieces), matrix.step))
    return OrthogonalizePlan(tuple(tuple(_batches(held)) for held in local), tuple(straddlers))


def _batches(matrices: Sequence[Matrix]) -> Iterator[Batch]:
    """Join matrices of one shape at equal distances that are scaled alike; `start` counts in the partition."""
    alike: dict[tuple[int, int, Step], list[int]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.rows, matrix.columns, matrix.step), []).append(matrix.start)
    for (rows, columns, step), starts in alike.items():
        first = 0
        while first < len(starts):
            last = first + 1
            stride = starts[last] - starts[first] if last < len(starts) else rows * columns
            while last < len(starts) and starts[last] - starts[last - 1] == stride:
                last += 1
            yield Batch(starts[first], stride, last - first, rows, columns, step)
            first = last
