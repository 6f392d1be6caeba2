"""Orthogonalization by Newton-Schulz: the arithmetic of Muon, apart from any optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.polynomials import Form, Quintic, coefficients, form_of

RESTARTS = {torch.bfloat16: (2,), torch.float16: (2,)}
"""Where the gram form begins anew: in half precision rounding makes R indefinite, which the steps would blow up."""


def newton_schulz(
    x: Tensor,
    polynomials: Sequence[Quintic] = coefficients("quintic", 5),
    form: Form | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the nearest semi-orthogonal matrix to each matrix of `x`, approximately.

    Args:
        x: `[..., A, B]`. It is not changed.
        polynomials: one quintic for each step.
        form: in which they are applied; None for the one with fewer operations.
        dtype: of the products; None for that of `x`. The norm is taken before the cast.

    Returns:
        `[..., A, B]` in `dtype`, singular values near 1 (Muon, K. Jordan 2024; Moonlight, equation 2). A zero matrix
        stays zero.
    """
    rows, columns = x.shape[-2:]
    dtype = dtype or x.dtype
    restarts = RESTARTS.get(dtype, ())
    form = form or form_of(rows, columns, len(polynomials), restarts)
    batch = x.reshape(-1, rows, columns)
    norm = torch.linalg.matrix_norm(batch, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    # However small a gradient is, its direction counts.
    batch = (batch * torch.where(norm > 0, 1 / norm, 0.0)).to(dtype)
    tall = rows > columns
    if tall:  # The Gram matrix is taken on the shorter side.
        batch = batch.mT
    batch = _standard(batch, polynomials) if form == "standard" else _gram(batch, polynomials, restarts)
    return (batch.mT if tall else batch).reshape(x.shape)


def _standard(x: Tensor, polynomials: Sequence[Quintic]) -> Tensor:
    for a, b, c in polynomials:
        gram = _symmetric(x, x.mT)
        x = torch.baddbmm(x, _symmetric(gram, gram, gram, b, c), x, beta=a)
    return x


def _gram(x: Tensor, polynomials: Sequence[Quintic], restarts: Sequence[int]) -> Tensor:
    """Apply the product of all polynomials at once.

    With P = aI + Z of a step, Q becomes PQ and R becomes PPR. All of them are polynomials of one symmetric matrix, so
    they commute and are symmetric.
    """
    gram, product = _symmetric(x, x.mT), None
    for step, (a, b, c) in enumerate(polynomials):
        if step in restarts and product is not None:
            x = product @ x
            gram, product = _symmetric(x, x.mT), None
        z = _symmetric(gram, gram, gram, b, c)
        if step + 1 < len(polynomials) and step + 1 not in restarts:
            gram = _symmetric(z, gram, gram, a)
            gram = _symmetric(z, gram, gram, a)
        if product is None:
            product = z
            product.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            product = _symmetric(z, product, product, a)
    assert product is not None
    return product @ x


def _symmetric(left: Tensor, right: Tensor, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """Return `beta add + alpha left right`, which is known to be symmetric."""
    if add is None:
        return torch.bmm(left, right)
    return torch.baddbmm(add, left, right, beta=beta, alpha=alpha)
