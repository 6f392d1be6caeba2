"""The minimum of a loss along a hyper-parameter, and how it moves with the width, against curves with known answers."""

from math import exp, inf, isnan, log

import numpy as np
import pytest

from jobs.study.fits.drift import drift
from jobs.study.fits.estimate import Unidentified
from jobs.study.fits.minimum import minimum

DRAWS = 400
COVERED = 0.92
"""Of 95 % intervals in so many draws, at least: a share of 0.92 or less of them has a chance of 1 %."""


def parabola(rates, best: float, curvature: float = 0.05, least: float = 3.0):
    return least + curvature * np.log(np.asarray(rates) / best) ** 2


@pytest.mark.parametrize("points", [4, 7])
@pytest.mark.parametrize("told", [True, False], ids=["noise of seeds", "noise of residuals"])
def test_minimum_covers_the_truth(points: int, told: bool):
    draws, rates, noise = np.random.default_rng(points), 0.001 * 2.0 ** np.arange(points), 0.005
    best = 0.001 * 2.0 ** (points / 2 - 0.3)
    found = [
        minimum(list(rates), list(parabola(rates, best) + draws.normal(0, noise, points)), noise if told else None)
        for _ in range(DRAWS)
    ]
    assert np.mean([best in one.at for one in found]) >= COVERED
    if told or points > 4:  # And they are no wider than they must be.
        assert np.median([one.at.high / one.at.low for one in found]) < 2


def test_exact_minimum_at_any_scale():
    for best in (3e-7, 0.016, 1e5):
        rates = [best * factor for factor in (0.11, 0.5, 1.7, 6.0)]
        found = minimum(rates, list(parabola(rates, best)))
        assert found.at.value == pytest.approx(best) and found.at.high / found.at.low < 1.001
        assert (found.loss, found.curvature) == (pytest.approx(3), pytest.approx(0.1)) and not found.border


def test_three_points_have_a_minimum_but_no_interval():
    found = minimum([1, 2, 4], [3.1, 3.0, 3.1])
    assert found.at.value == pytest.approx(2) and isnan(found.at.low) and isnan(found.at.high)
    assert minimum([1, 2, 4], [3.1, 3.0, 3.1], noise=0.005).at.low > 1.5


def test_a_best_at_the_end_is_told():
    assert minimum([1, 2, 4, 8], list(parabola([1, 2, 4, 8], 16.0))).border
    assert minimum([1, 2, 4, 8], list(parabola([1, 2, 4, 8], 1.2))).border  # The least measured is the first.


def test_losses_that_hardly_bend_bound_nothing():
    found = minimum([1, 2, 4, 8], [3.001, 3.0, 3.002, 3.001], noise=0.01)
    assert (found.at.low, found.at.high) == (0, inf)


def test_seeds_of_one_value_count_and_failed_trials_do_not():
    rates, losses = [1, 2, 2, 4, 8, 8], [3.1, 3.02, 2.98, 3.1, inf, None]
    assert minimum(rates, losses).at.value == pytest.approx(2)


def test_only_the_nearest_are_fitted():
    rates = [2.0**k for k in range(-4, 5)]
    losses = [3 + 0.05 * log(rate / 2) ** 2 + max(0.0, log(rate / 4)) * 2 for rate in rates]  # It diverges above 4.
    assert minimum(rates, losses, nearest=3).at.value == pytest.approx(2)
    assert minimum(rates, losses).at.value < 1.5


@pytest.mark.parametrize("rates, losses", [([1, 2], [3, 2]), ([1, 2, 4], [3, None, 2]), ([1, 2, 4], [3, 3.1, 3])])
def test_no_minimum(rates, losses):
    with pytest.raises(Unidentified):
        minimum(rates, losses)


@pytest.mark.parametrize("told", [True, False], ids=["noise of the grid", "noise of residuals"])
def test_drift_covers_the_truth(told: bool):
    draws, widths, noise = np.random.default_rng(3), np.array([32, 64, 128, 256]), 0.1
    truth = log(0.02) - 30 / widths
    found = [
        drift(list(widths), list(np.exp(truth + draws.normal(0, noise, 4))), noise if told else None)
        for _ in range(DRAWS)
    ]
    assert np.mean([30 in one.alpha for one in found]) >= COVERED
    assert np.mean([0.02 in one.limit for one in found]) >= COVERED
    assert np.mean([exp(log(0.02) - 30 / 1024) in one.at(1024) for one in found]) >= COVERED
    assert np.mean([0 in one.alpha for one in found]) < 0.9 or not told  # It can tell that there is a drift.


def test_exact_drift_and_none():
    found = drift([32, 64, 128], [exp(-4 + 8 / n) for n in (32, 64, 128)])
    assert found.alpha.value == pytest.approx(-8) and found.limit.value == pytest.approx(exp(-4))
    assert found.at(32).value == pytest.approx(exp(-4 + 0.25))
    still = drift([32, 64, 128, 256], [0.01] * 4)
    assert still.alpha.value == pytest.approx(0, abs=1e-12) and still.limit.value == pytest.approx(0.01)


def test_two_widths_have_a_drift_but_an_interval_only_with_the_grids_error():
    assert isnan(drift([32, 64], [0.01, 0.02]).alpha.low)
    assert 0 in drift([32, 64], [0.01, 0.02], errors=log(2)).alpha


def test_one_width_has_none():
    with pytest.raises(Unidentified, match="two widths"):
        drift([64, 64], [0.01, 0.02])
