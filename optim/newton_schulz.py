"""Orthogonalization by Newton-Schulz: the arithmetic of Muon, apart from any optimizer."""

import functools
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from optim.polynomials import Form, Precision, Quintic, coefficients, form_of, restarts

PRECISIONS: dict[torch.dtype, Precision] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
SMALLEST_IN_BLOCKS = 384
"""Rows of a symmetric product from which three or four blocks save a fifth on a CPU; smaller blocks are too slow."""
SMALLEST_IN_KERNEL, FEWEST_IN_KERNEL = 1024, 10**11
"""Rows of a symmetric product, and operations of a batch of them, from which a GPU's kernel saves time."""


class Workspace:
    """Memory that is used again and again: on a CPU fresh pages cost a tenth of a whole orthogonalization."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def carve(self, device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Return a tensor of each shape, with whatever is in them; the last call's are the same memory."""
        sizes = [prod(shape) for shape in shapes]
        if self._flat.numel() < sum(sizes) or self._flat.dtype != dtype or self._flat.device != device:
            self._flat = torch.empty(sum(sizes), device=device, dtype=dtype)
        parts = self._flat[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def workspace_shapes(count: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """Return the shapes of what `count` matrices take while they are orthogonalized, the result included."""
    short = min(rows, columns)
    return [(count, rows, columns)] * 2 + [(count, short, short)] * 4


def newton_schulz(
    x: Tensor,
    polynomials: tuple[Quintic, ...] = coefficients("quintic", 5),
    form: Form | None = None,
    dtype: torch.dtype | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Return the nearest semi-orthogonal matrix to each matrix of `x`, approximately.

    Args:
        x: `[..., A, B]`. It is not changed.
        polynomials: one quintic for each step.
        form: in which they are applied; None for the one with fewer operations.
        dtype: of the products; None for that of `x`. The norm is taken before the cast, of any float: a momentum decays
            through every scale that there is.
        workspace: where everything is computed, the result included, which the next call overwrites.

    Returns:
        `[..., A, B]` in `dtype`, singular values near 1 (Muon, K. Jordan 2024; Moonlight, equation 2). A zero matrix
        stays zero.
    """
    rows, columns = x.shape[-2:]
    dtype = dtype or x.dtype
    batch = x.reshape(-1, rows, columns)
    shapes = workspace_shapes(batch.shape[0], rows, columns)
    left, right, *squares = (workspace or Workspace()).carve(x.device, dtype, *shapes)
    # The squares of fp32 leave its range long before the elements do. The inverse of a norm near either end does, too,
    # so that half of it is multiplied at a time.
    norm = torch.linalg.matrix_norm(batch, keepdim=True, dtype=torch.float64)
    root = torch.where(norm > 0, norm.rsqrt(), 0.0).to(torch.promote_types(x.dtype, torch.float32))
    torch.mul(batch * root, root, out=left)
    if rows > columns:  # The Gram matrix is taken on the shorter side.
        left, right = left.mT, right.mT
    beginnings, blocks = restarts(polynomials, PRECISIONS[dtype]), _blocks(left)
    share = (blocks + 1) / (2 * blocks)
    if (form or form_of(rows, columns, len(polynomials), beginnings, share)) == "standard":
        result = _standard(left, right, squares, polynomials)
    else:
        result = _gram(left, right, squares, polynomials, beginnings)
    return (result.mT if rows > columns else result).view(x.shape)


def _standard(x: Tensor, spare: Tensor, squares: Sequence[Tensor], polynomials: Sequence[Quintic]) -> Tensor:
    """Multiply x by one polynomial of its Gram matrix R after the other."""
    gram, z, *_ = squares
    for a, b, c in polynomials:
        _symmetric(x, x.mT, gram)
        _symmetric(gram, gram, z, gram, b, c)
        _apply(z, x, spare, a)
        x, spare = spare, x
    return x


def _gram(
    x: Tensor, spare: Tensor, squares: Sequence[Tensor], polynomials: Sequence[Quintic], beginnings: Sequence[int]
) -> Tensor:
    """Multiply x by the product Q of all polynomials, which is built from the Gram matrix R alone.

    With a step's polynomial P = aI + Z, Q becomes PQ and R becomes PPR. All of them are polynomials of one symmetric
    matrix, so they commute and are symmetric.
    """
    gram, z, product, other = squares
    _symmetric(x, x.mT, gram)
    fresh = True
    for step, (a, b, c) in enumerate(polynomials):
        if step in beginnings:
            _apply(product, x, spare)
            x, spare, fresh = spare, x, True
            _symmetric(x, x.mT, gram)
        _symmetric(gram, gram, z, gram, b, c)
        if step + 1 < len(polynomials) and step + 1 not in beginnings:
            _symmetric(z, gram, other, gram, a)
            _symmetric(z, other, gram, other, a)
        if fresh:
            z.diagonal(dim1=-2, dim2=-1).add_(a)
            product, z, fresh = z, product, False
        else:
            _symmetric(z, product, other, product, a)
            product, other = other, product
    _apply(product, x, spare)
    return spare


def _apply(symmetric: Tensor, x: Tensor, result: Tensor, beta: float = 0.0) -> None:
    """Set `result` to `beta x + symmetric x`.

    Tall matrices come as transposed views and are multiplied from the right, so that memory is written row by row: a
    CPU's products in bf16 are a thousand times slower otherwise.
    """
    if x.stride(-1) == 1:
        torch.baddbmm(x, symmetric, x, beta=beta, out=result)
    else:
        torch.baddbmm(x.mT, x.mT, symmetric, beta=beta, out=result.mT)


def _symmetric(
    left: Tensor, right: Tensor, result: Tensor, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> None:
    """Set `result` to `beta add + alpha left right`, known to be symmetric: of a large one half the blocks."""
    rows = left.shape[-2]
    if (kernel := _kernel(left)) is not None:
        kernel(left, right, C=add, out=result, alpha=alpha, beta=beta if add is not None else 1.0)
        return
    height = -(-rows // _blocks(left))
    for low in range(0, rows, height):
        high = min(low + height, rows)
        part, across, down = result[:, low:high, :high], left[:, low:high], right[:, :, :high]
        if add is None:
            torch.bmm(across, down, out=part)
        else:
            torch.baddbmm(add[:, low:high, :high], across, down, beta=beta, alpha=alpha, out=part)
        result[:, :low, low:high] = result[:, low:high, :low].mT


def _kernel(matrices: Tensor) -> Callable[..., Tensor] | None:
    """Return a GPU's kernel for the symmetric product of `matrices` with their transposes, where it is faster.

    It has fp32 sums, as cuBLAS. Measured on an H100: 1.2 to 1.9 times as fast for matrices of 1,408 and 2,048 rows in
    batches; slower where the product takes less than the tenth of a millisecond that its start costs.
    """
    batch, rows, columns = matrices.shape
    if not matrices.is_cuda or matrices.element_size() != 2 or rows < SMALLEST_IN_KERNEL:
        return None
    if rows % 8 or columns % 8 or 2 * batch * rows * rows * columns < FEWEST_IN_KERNEL:
        return None
    return _quack() if torch.cuda.get_device_capability(matrices.device) >= (9, 0) else None


@functools.cache
def _quack() -> Callable[..., Tensor] | None:
    """Return quack's symmetric product where the extra `gpu` is installed. Its import takes hold of the GPU."""
    try:
        from quack.gemm_interface import gemm_symmetric  # type: ignore[import-not-found]
    except ImportError:
        return None
    return gemm_symmetric


def _blocks(matrices: Tensor) -> int:
    """Return into how many rows of blocks a symmetric product of so many rows is cut."""
    rows = matrices.shape[-2]
    return min(4, rows // 128) if matrices.device.type == "cpu" and rows >= SMALLEST_IN_BLOCKS else 1
