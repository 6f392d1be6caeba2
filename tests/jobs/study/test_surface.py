"""The law in parameters and tokens, against synthetic losses with known answers."""

import numpy as np
import pytest

from jobs.study.fits.estimate import Unidentified
from jobs.study.fits.surface import Point, fit_surface

SIZES, BUDGETS = (1e5, 3e5, 1e6, 3e6), (10, 30, 100)


def points(noise: float = 0.0, seed: int = 0, sizes=SIZES, budgets=BUDGETS) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [
        Point(n, n * b, (1.2 + 20 * n**-0.3 + 150 * (n * b) ** -0.35) * np.exp(rng.normal(0, noise)))
        for n in sizes
        for b in budgets
    ]


def test_exact():
    found = fit_surface(points(), draws=5)
    assert (found.alpha.value, found.beta.value) == (pytest.approx(0.3, abs=0.005), pytest.approx(0.35, abs=0.005))
    assert found.floor.value == pytest.approx(1.2, abs=0.02)
    assert found.loss(1e7, 1e9) == pytest.approx(1.2 + 20 * 1e7**-0.3 + 150 * 1e9**-0.35, rel=0.005)


def test_exponents_cover_the_truth():
    hits = [0, 0]
    for seed in range(100):
        found = fit_surface(points(0.004, seed), draws=40)
        hits[0] += 0.3 in found.alpha
        hits[1] += 0.35 in found.beta
    assert min(hits) >= 90, hits


@pytest.mark.parametrize(
    "measured, reason",
    [
        (points(budgets=(20,)) + points(budgets=(20,)), "cannot be told apart"),
        (points(sizes=(1e5,), budgets=(1, 2, 3, 4, 5, 6, 7)), "cannot be told apart"),
        (points(sizes=(1e5, 1e6), budgets=(1, 3, 7)), "three sizes"),
        (points(sizes=(1e5,), budgets=(1, 3)), "6 points, not 2"),
    ],
)
def test_refused(measured, reason):
    with pytest.raises(Unidentified, match=reason):
        fit_surface(measured)
