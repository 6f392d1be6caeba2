"""Carries out one group's plan on one rank: a step of Muon on its flat shard.

The pieces of straddling matrices fly to their owners while the matrices that lie whole in the shard are done; then the
owners do theirs, and the slices of the results fly back. A local matrix is read and written where it lies, and all that
happens to it happens while it is in the caches: momentum, orthogonalization, weight decay and update.

A matrix without a gradient is idle: an expert that got no token, a router whose gates do not depend on it.
Newton-Schulz takes the size away, so that a momentum of long ago, or rounding, would move it as far as any. It is left
where it is but for its weight decay, as AdamW leaves what has no gradient; its momentum decays.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from optim.assignment import Batch, OrthogonalizePlan, Piece
from optim.config import OptimConfig, precision_on
from optim.newton_schulz import Workspace, newton_schulz
from optim.polynomials import coefficients

BATCH_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 26}
"""Of the matrices that are orthogonalized at once: so many that a CPU keeps them in its caches, and a GPU is busy."""
IDLE = 1e-6
"""A matrix is idle whose gradient has a smaller RMS than this share of the RMS of all matrices' gradients. Where terms
cancel that rounding of fp32 leaves 1e-7 of their size; what an expert gets from one token in a million is above it."""


def dtype_on(kind: str, choice: str = "auto") -> torch.dtype:
    """Return the dtype that a precision of the config means on a kind of device."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision_on(kind, choice)]


class Rule:
    """What happens to a matrix, wherever it is: momentum, orthogonalization, weight decay and update.

    Apart from any process group: `raymuon plan` learns from it, on tensors without data, what it costs.

    Args:
        config: the optimizer's settings.
        kind: of the device, `cpu` or `cuda`.
    """

    def __init__(self, config: OptimConfig, kind: str) -> None:
        self.config, self.dtype = config, dtype_on(kind, config.ns_dtype)
        self.polynomials = coefficients(config.ns_coefficients, config.ns_steps)

    def step(
        self,
        weights: Tensor,
        gradient: Tensor,
        momentum: Tensor,
        busy: Tensor,
        rate: float,
        decay: float,
        workspace: Workspace | None = None,
    ) -> None:
        """Do all of it to whole matrices, `[count, A, B]` each; `busy` is 0 for those that are not moved."""
        rows, columns = weights.shape[-2:]
        orthogonal = self.orthogonalize(self.direction(gradient, momentum), workspace).mul_(busy)
        self.update(weights, orthogonal, rows, columns, rate, decay)

    def direction(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Move the momentum on, and return what is orthogonalized: itself, or a look-ahead in the gradient's memory."""
        momentum.lerp_(gradient, 1 - self.config.momentum)
        return gradient.lerp_(momentum, self.config.momentum) if self.config.nesterov else momentum

    def orthogonalize(self, matrices: Tensor, workspace: Workspace | None = None) -> Tensor:
        """Return O, or, where each update is measured, O with the norm that it would have with singular values of 1."""
        orthogonal = newton_schulz(matrices, self.polynomials, self.config.form, self.dtype, workspace)
        if self.config.rms_control == "update_norm":
            norm = torch.linalg.matrix_norm(orthogonal, keepdim=True, dtype=torch.float32)
            orthogonal.mul_(torch.where(norm > 0, min(orthogonal.shape[-2:]) ** 0.5 / norm, 0.0))
        return orthogonal

    def update(self, weights: Tensor, orthogonal: Tensor, rows: int, columns: int, rate: float, decay: float) -> None:
        """Move weights, or a piece of them, of a matrix of so many rows and columns, a share of which decays."""
        scale = self.config.update_rms * max(rows, columns) ** 0.5
        weights.mul_(1 - decay).add_(orthogonal, alpha=-rate * scale)


class Exchange:
    """One rank's part in the plan of a group.

    Args:
        plan: of the group.
        config: the optimizer's settings.
        process_group: the ranks over which the group is laid out.
        device: of the shard.
    """

    def __init__(
        self, plan: OrthogonalizePlan, config: OptimConfig, process_group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self.plan, self.group, self.device = plan, process_group, device
        self.wire_dtype = dtype_on(device.type, config.wire_dtype)
        self.rule = Rule(config, device.type)
        # A GPU's allocator keeps its memory anyway.
        self.workspace = Workspace() if device.type == "cpu" else None
        self.rank = dist.get_rank(process_group)
        peers = range(dist.get_world_size(process_group))
        sent = [plan.sent(self.rank, peer) for peer in peers]
        received = [plan.sent(peer, self.rank) for peer in peers]
        self.away, self.away_sizes = [p for peer in sent for p in peer], [_elements(peer) for peer in sent]
        self.guests, self.guest_sizes = [p for peer in received for p in peer], [_elements(peer) for peer in received]
        self.owned = [index for index, matrix in enumerate(plan.straddlers) if matrix.owner == self.rank]
        self.kept = [p for index in self.owned for p in plan.straddlers[index].pieces if p.holder == self.rank]
        self.batches = [part for batch in plan.local[self.rank] for part in cut(batch, device.type)]
        self.numel = plan.numel
        sizes = [matrix.rows * matrix.columns for matrix in plan.straddlers]
        self.straddlers = torch.tensor(sizes, dtype=torch.float64, device=device)

    def step(self, shard: Tensor, gradient: Tensor, momentum: Tensor, lr: float, weight_decay: float) -> None:
        """Update momentum and weights: `w <- (1 - lr wd) w - lr rms sqrt(max(A, B)) O` (Moonlight, equation 4).

        Each matrix has factors of its own on both, where the model's width has its rule (`optim.mup`).

        Args:
            shard: this rank's weights, flat.
            gradient: alike; its memory is used.
            momentum: alike.
            lr: learning rate.
            weight_decay: multiplied by it.
        """
        squares, sums, agreed = self._squares(gradient)
        own = {(p.matrix, p.position): self.rule.direction(*_pieces(p, gradient, momentum)) for p in self.kept}
        outgoing = [self.rule.direction(*_pieces(p, gradient, momentum)) for p in self.away]
        gathered, arrival = self._all_to_all(outgoing, self.away_sizes, self.guest_sizes)
        agreed.wait()
        least = IDLE**2 * sums[0] / self.numel
        for batch, square in zip(self.batches, squares, strict=True):
            weights, own_gradient, own_momentum = (_view(tensor, batch) for tensor in (shard, gradient, momentum))
            busy = (square > least * (batch.rows * batch.columns)).view(-1, 1, 1)
            rate, decay = lr * batch.step.rate, lr * weight_decay * batch.step.decay
            self.rule.step(weights, own_gradient, own_momentum, busy, rate, decay, self.workspace)
        if arrival is None:
            return

        arrival.wait()
        busy = sums[1:] > least * self.straddlers
        for p, piece in zip(self.guests, gathered.split([p.length for p in self.guests]), strict=True):
            own[p.matrix, p.position] = piece.to(gradient.dtype)
        results: dict[int, Tensor] = {}
        for index in self.owned:
            matrix = self.plan.straddlers[index]
            whole = torch.cat([own[index, p.position] for p in matrix.pieces])
            whole = whole.view(1, matrix.rows, matrix.columns)
            results[index] = self.rule.orthogonalize(whole).mul_(busy[index]).flatten()

        answers = [_slice(results, p) for p in self.guests]
        returned, arrival = self._all_to_all(answers, self.guest_sizes, self.away_sizes)
        self._update_pieces(shard, self.kept, (_slice(results, p) for p in self.kept), lr, weight_decay)
        arrival.wait()  # type: ignore[union-attr]
        self._update_pieces(shard, self.away, returned.split([p.length for p in self.away]), lr, weight_decay)

    def _squares(self, gradient: Tensor) -> tuple[list[Tensor], Tensor, dist.Work]:
        """Measure the gradient, before its memory is used.

        Returns:
            The sum of squares of each matrix, for each batch; that of the whole group's gradient followed by those of
            the straddlers, the same on every rank once the work is done; and that work.
        """
        squares = [square_of(_view(gradient, batch)) for batch in self.batches]
        sums = torch.zeros(1 + len(self.straddlers), dtype=torch.float64, device=self.device)
        for p in (*self.kept, *self.away):
            (piece,) = _pieces(p, gradient)
            sums[1 + p.matrix] += square_of(piece.view(1, 1, -1))[0]
        sums[0] = sums[1:].sum() + sum(square.sum() for square in squares)
        return squares, sums, dist.all_reduce(sums, group=self.group, async_op=True)  # type: ignore[return-value]

    def _update_pieces(
        self, shard: Tensor, pieces: Iterable[Piece], slices: Iterable[Tensor], lr: float, weight_decay: float
    ) -> None:
        for p, orthogonal in zip(pieces, slices, strict=True):
            matrix = self.plan.straddlers[p.matrix]
            (weights,) = _pieces(p, shard)
            rate, decay = lr * matrix.step.rate, lr * weight_decay * matrix.step.decay
            self.rule.update(weights, orthogonal, matrix.rows, matrix.columns, rate, decay)

    def _all_to_all(
        self, pieces: list[Tensor], send_sizes: list[int], receive_sizes: list[int]
    ) -> tuple[Tensor, dist.Work | None]:
        """Start sending `pieces` (nothing happens where the group has no straddlers) and return what will arrive."""
        packed = torch.cat(pieces) if pieces else torch.empty(0, device=self.device)
        arrived = torch.empty(sum(receive_sizes), dtype=self.wire_dtype, device=self.device)
        if not self.plan.straddlers:
            return arrived, None
        packed = packed.to(self.wire_dtype)
        work = dist.all_to_all_single(arrived, packed, receive_sizes, send_sizes, group=self.group, async_op=True)
        return arrived, work


def square_of(matrices: Tensor) -> Tensor:
    """Return the sum of squares of each matrix in fp64: those of fp32 would leave its range."""
    return torch.linalg.matrix_norm(matrices, dtype=torch.float64).square()


def _elements(pieces: Iterable[Piece]) -> int:
    return sum(piece.length for piece in pieces)


def _pieces(piece: Piece, *tensors: Tensor) -> Iterator[Tensor]:
    """Yield what lies at a piece in flat tensors."""
    return (tensor[piece.offset : piece.offset + piece.length] for tensor in tensors)


def _slice(results: dict[int, Tensor], piece: Piece) -> Tensor:
    """Return a piece's part of its matrix's result."""
    return results[piece.matrix][piece.position : piece.position + piece.length]


def _view(flat: Tensor, batch: Batch) -> Tensor:
    """Return a batch's matrices where they lie."""
    size, stride = (batch.count, batch.rows, batch.columns), (batch.stride, batch.columns, 1)
    return flat.as_strided(size, stride, flat.storage_offset() + batch.offset)


def cut(batch: Batch, kind: str) -> Iterator[Batch]:
    """Cut a batch into parts that a kind of device orthogonalizes at once: of one matrix at least."""
    most = max(1, BATCH_ELEMENTS[kind] // (batch.rows * batch.columns))
    for first in range(0, batch.count, most):
        yield replace(batch, offset=batch.offset + first * batch.stride, count=min(most, batch.count - first))
