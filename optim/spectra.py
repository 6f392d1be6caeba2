"""Singular values of weight matrices and their entropy: how many directions of a matrix are in use.

Both come from the eigenvalues of the smaller Gram matrix, which are had in a quarter of a decomposition's time. In fp64
what that loses lies below 6e-8 of the largest singular value, as the rounding of the fp32 weights themselves does
(docs/spectra.md has the measurement).
"""

import math

import torch
from torch import Tensor


def entropy(squares: Tensor) -> float:
    """Return the entropy of squared singular values as shares of their sum, over the log of their number: 0 to 1.

    `-sum(p log p) / log n`, `p_i = s_i^2 / sum(s^2)` (Moonlight, section 3.4). It does not depend on the scale. A
    single value has 0, and so has a matrix of zeros, of which no share can be taken.

    Args:
        squares: `[n]`, none negative.
    """
    total = squares.sum(dtype=torch.float64)
    if len(squares) == 1 or not total:
        return 0.0
    return (torch.special.entr(squares.double() / total).sum() / math.log(len(squares))).item()


def singular_values(matrix: Tensor) -> Tensor | None:
    """Return all singular values, fp64 `[min(rows, columns)]`, the largest first.

    Args:
        matrix: `[rows, columns]` in fp32 or less.

    Returns:
        None where the matrix is not finite, or they are not found.
    """
    squares = _squares(matrix.double())  # The squares of all that fp32 holds are within the range of fp64.
    return None if squares is None else squares.flip(0).sqrt()


def svd_entropy(matrix: Tensor) -> float | None:
    """Return the entropy of a matrix's spectrum in fp32, within 1e-5: fast enough for a training step.

    A matrix that has none is no reason to end a run: None for one that is not finite, or whose values are not found.
    """
    matrix = matrix.float()
    # Of any scale: squares leave the range of fp32 long before the elements do.
    squares = _squares(matrix / (matrix.abs().max() or 1.0))
    return None if squares is None else entropy(squares)


def _squares(matrix: Tensor) -> Tensor | None:
    """Return the squared singular values, the smallest first, or None."""
    if not matrix.isfinite().all():
        return None
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.mT
    try:
        return torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0)
    except torch.linalg.LinAlgError:
        return None
