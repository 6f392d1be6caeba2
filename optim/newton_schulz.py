"""Orthogonalization by Newton-Schulz: the arithmetic of Muon, apart from any optimizer."""

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's coefficients: steepest slope at zero, singular values end in about [0.7, 1.2]."""


def newton_schulz(
    x: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = QUINTIC, eps: float = 1e-7
) -> Tensor:
    """Return the nearest semi-orthogonal matrix to each matrix of `x`, approximately.

    Args:
        x: `[..., A, B]`; the arithmetic is done in its dtype. It is not changed.
        steps: iterations of `X <- aX + b(XX')X + c(XX')^2 X`.
        coefficients: a, b, c.
        eps: the smallest Frobenius norm that is divided by, so that a zero matrix stays zero.

    Returns:
        `[..., A, B]`, singular values near 1 (Muon, K. Jordan 2024; Moonlight, equation 2).
    """
    a, b, c = coefficients
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    tall = shape[-2] > shape[-1]
    if tall:  # The Gram matrix is taken on the shorter side.
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)
