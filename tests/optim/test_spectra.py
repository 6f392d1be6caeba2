"""Singular values and their entropy, against spectra that are known and against torch's decomposition in fp64."""

import math

import pytest
import torch
from torch import Tensor

from optim.spectra import entropy, singular_values, svd_entropy

pytestmark = pytest.mark.numeric

FLOOR = 1e-7
"""Of the largest value: what lies below is rounding, of fp32 weights as of the way by the Gram matrix."""
SHAPES = [(8, 8), (5, 30), (40, 12), (1, 7), (7, 1), (1, 1), (64, 65)]


def entropy_by_svd(matrix: Tensor) -> float:
    squares = torch.linalg.svdvals(matrix.double()).square()
    shares = squares / squares.sum()
    return (-(shares * shares.log()).nansum() / math.log(len(shares))).item()


def of_spectrum(values: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix with these singular values, fp64 rounded to fp32."""
    random = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=random, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    return ((left * values) @ right.mT).float()


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_those_of_the_decomposition(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact, found = torch.linalg.svdvals(matrix.double()), singular_values(matrix)
    assert found.dtype == torch.float64 and found.shape == exact.shape
    assert (found - exact).abs().max() <= 1e-11 * exact[0]


@pytest.mark.parametrize("ratio", [0.99, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20)])
def test_a_geometric_spectrum_has_the_entropy_of_the_formula(shape, ratio):
    number = min(shape)
    values = ratio ** torch.arange(number, dtype=torch.float64)
    matrix = of_spectrum(values, *shape)
    found = singular_values(matrix)
    assert (found - values).abs().max() < FLOOR
    # Shares are (1 - q) q^i / (1 - q^n) with q = ratio^2; the entropy of that in closed form.
    q = ratio**2
    mean_index = q / (1 - q) - number * q**number / (1 - q**number)
    closed = (math.log((1 - q**number) / (1 - q)) - mean_index * math.log(q)) / math.log(number)
    assert entropy(found.square()) == pytest.approx(closed, abs=1e-7)
    assert svd_entropy(matrix) == pytest.approx(closed, abs=1e-5)


@pytest.mark.parametrize("measure", [svd_entropy, lambda matrix: entropy(singular_values(matrix).square())])
def test_the_ends_of_the_entropy(measure):
    orthogonal = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(2)))[0]
    assert measure(orthogonal) == pytest.approx(1.0, abs=1e-6)
    assert measure(orthogonal[:7]) == pytest.approx(1.0, abs=1e-6)
    assert measure(torch.eye(6)) == pytest.approx(1.0)
    assert measure(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))) == pytest.approx(0.5)
    assert measure(torch.ones(60, 40)) == pytest.approx(0.0, abs=1e-5)
    assert measure(torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 5.0))) == pytest.approx(0.0, abs=1e-5)
    assert measure(torch.zeros(6, 4)) == measure(torch.ones(1, 9)) == measure(torch.ones(9, 1)) == 0.0


@pytest.mark.parametrize("exponent", [-149, -130, -100, -80, -60, 0, 60, 80, 100, 120])
def test_the_scale_does_not_matter(exponent):
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scaled = (matrix * 2.0**exponent).float()
    exact = torch.linalg.svdvals(scaled.double())
    found = singular_values(scaled)
    assert ((found - exact).abs() <= FLOOR * exact[0]).all()
    assert entropy(found.square()) == pytest.approx(entropy_by_svd(scaled), abs=1e-12)
    assert svd_entropy(scaled) == pytest.approx(entropy_by_svd(scaled), abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_matrix_that_is_not_finite_has_none(value):
    matrix = torch.eye(5, 7)
    matrix[2, 2] = value
    assert svd_entropy(matrix) is None and singular_values(matrix) is None
