"""Power laws and the ratio of what they cost, against synthetic curves with known answers."""

from math import inf, isnan

import numpy as np
import pytest

from jobs.study.fits.estimate import Unidentified
from jobs.study.fits.measured import Measured
from jobs.study.fits.power_law import Fit, PowerLaw, fit_power_law, fit_with_floor
from jobs.study.fits.ratio import common_losses, projected, ratio_of, ratios

COSTS = np.array([1e12, 4e12, 1.6e13, 5e13])
ADAMW, MUON = PowerLaw(2.2 * 1e13**0.06, 0.06), PowerLaw(2.2 * 6e12**0.065, 0.065)
TABLE_3 = {"muon": PowerLaw(2.506, 0.052), "adamw": PowerLaw(2.608, 0.054)}
"""Moonlight (arXiv 2502.16982), table 3; costs in PFLOP/s-days."""


def measured(law: PowerLaw, draws: np.random.Generator, noise: float, seeds: int = 3, costs=COSTS) -> Measured:
    return Measured.of((cost, law.loss(cost) * np.exp(draws.normal(0, noise, seeds))) for cost in costs)


def test_moonlights_fits_give_moonlights_ratio():
    found = {loss: ratio_of(TABLE_3["muon"], TABLE_3["adamw"], loss) for loss in (3.0, 2.6, 2.4, 2.23)}
    assert found == {
        3.0: pytest.approx(0.42, abs=0.005),
        2.6: pytest.approx(0.465, abs=0.0005),
        2.4: pytest.approx(0.493, abs=0.0005),
        2.23: pytest.approx(0.519, abs=0.001),
    }


def test_moonlights_ratio_out_of_points():
    """The same, out of points on the two laws, read off between them."""
    costs = np.geomspace(0.01, 100, 30)
    fits = [
        fit_power_law(Measured.of((cost, [law.loss(cost)]) for cost in costs))
        for law in (TABLE_3["adamw"], TABLE_3["muon"])
    ]
    found = ratios(*fits, [3.0, 2.6, 2.4, 2.23])
    assert [1 / one.value.value for one in found] == pytest.approx([0.42, 0.465, 0.493, 0.519], abs=0.003)


@pytest.mark.parametrize("seeds, points, noise", [(3, 4, 0.003), (1, 5, 0.003), (2, 4, 0.02), (1, 4, 0.0005)])
def test_exponents_and_ratios_cover_the_truth(seeds: int, points: int, noise: float):
    draws, costs, loss = np.random.default_rng(seeds), np.geomspace(1e12, 5e13, points), 2.1
    hits = {"exponent": 0, "scale": 0, "ratio": 0, "projected": 0}
    for _ in range(100):
        first, second = (fit_power_law(measured(law, draws, noise, seeds, costs)) for law in (ADAMW, MUON))
        hits["exponent"] += ADAMW.exponent in first.exponent
        hits["scale"] += MUON.scale in second.scale
        (between,), (beyond,) = ratios(first, second, [loss]), projected(first, second, [1.9])
        # Between points the curves are straight in logarithms, so that what is read off is exact but for the noise.
        hits["ratio"] += ratio_of(ADAMW, MUON, loss) in between.value
        hits["projected"] += ratio_of(ADAMW, MUON, 1.9) in beyond.value
    assert min(hits.values()) >= 90, hits


def test_intervals_shrink_with_seeds():
    draws = np.random.default_rng(5)
    widths = {
        seeds: np.median(
            [(found := fit_power_law(measured(MUON, draws, 0.005, seeds)).exponent).high - found.low for _ in range(40)]
        )
        for seeds in (1, 2, 6)
    }
    assert widths[1] > 1.5 * widths[2] and widths[2] > 1.5 * widths[6]


@pytest.mark.parametrize("floor, exponent, noise", [(1.3, 0.31, 0.0005), (1.7, 0.3, 0.001)])
def test_floors_cover_the_truth(floor: float, exponent: float, noise: float):
    law, draws = PowerLaw(0.8 * 1e12**exponent, exponent, floor), np.random.default_rng(1)
    costs, hits = np.geomspace(1e11, 3e14, 7), {"exponent": 0, "floor": 0}
    for _ in range(100):
        found = fit_with_floor(measured(law, draws, noise, 2, costs), draws=100)
        assert found.floor is not None
        hits["exponent"] += exponent in found.exponent
        hits["floor"] += floor in found.floor
    assert min(hits.values()) >= 90, hits


def test_exact_laws_at_outer_ranges():
    for scale, exponent, floor in ((3.0, 1e-3, 0.0), (1e4, 0.7, 0.0), (40.0, 0.2, 1.5)):
        law, costs = PowerLaw(scale, exponent, floor), np.geomspace(1e3, 1e9, 8)
        found = (fit_with_floor if floor else fit_power_law)(Measured.of((c, [law.loss(c)]) for c in costs))
        assert found.law.exponent == pytest.approx(exponent, rel=1e-3)
        assert found.law.loss(1e6) == pytest.approx(law.loss(1e6), rel=1e-6)
        assert found.law.cost(law.loss(1e6)) == pytest.approx(1e6, rel=1e-2)


def test_a_run_that_went_wrong_pulls_little():
    points = [(cost, [MUON.loss(cost)]) for cost in np.geomspace(1e12, 1e14, 9)]
    points[4] = (points[4][0], [1.3 * points[4][1][0]])
    assert fit_power_law(Measured.of(points)).law.exponent == pytest.approx(MUON.exponent, rel=0.02)


@pytest.mark.parametrize(
    "points, reason",
    [
        ([(1e12, [3.0]), (1e13, [2.8]), (1e14, [2.7])], "4 points, not 3"),
        ([(1e12, [3.0]), (2e12, [2.8]), (4e12, [2.7]), (8e12, [2.65])], "span a factor of 30, not 8"),
        ([(c, [MUON.loss(c) * (1 + 0.002 * (-1) ** i)]) for i, c in enumerate(COSTS)], "E is within the noise"),
        ([(c, [MUON.loss(c)] * 3) for c in COSTS], "E is within the noise"),
        ([(c, [0.5 + c / 1e14]) for c in COSTS], "do not fall"),
    ],
)
def test_no_floor(points, reason):
    with pytest.raises(Unidentified, match=reason):
        fit_with_floor(Measured.of(points))


@pytest.mark.parametrize(
    "points, reason",
    [
        ([(1e12, [3.0])], "2 points, not 1"),
        ([(1e12, [3.0]), (1.5e12, [2.9])], "factor of 2, not 1.5"),
        ([(1e12, [3.0]), (1e13, [3.0])], "do not fall"),
        ([(1e12, [3.0]), (1e12, [2.9])], "one cost"),
        ([(1e12, [3.0]), (1e13, [inf])], "no positive number"),
        ([(1e12, [3.0]), (1e13, [])], "no positive number"),
    ],
)
def test_no_law(points, reason):
    with pytest.raises(Unidentified, match=reason):
        fit_power_law(Measured.of(points))


def test_two_points_have_a_law_but_an_interval_only_with_seeds():
    assert isnan(fit_power_law(Measured.of([(1e12, [3.0]), (1e13, [2.8])])).exponent.low)
    with_seeds = fit_power_law(Measured.of([(1e12, [3.0, 3.01]), (1e13, [2.8, 2.81])]))
    assert 0 < with_seeds.exponent.low < with_seeds.law.exponent < with_seeds.exponent.high


def exact(*points: tuple[float, float]) -> Fit:
    return fit_power_law(Measured.of((cost, [loss]) for cost, loss in points))


def test_losses_that_are_not_monotone_are_reached_first_where_they_are_first_reached():
    bumpy, straight = exact((1, 4), (10, 2), (100, 2.5), (1000, 1)), exact((1, 4), (1000, 1))
    (found,) = ratios(bumpy, straight, [2.0])
    assert found.value.value == pytest.approx(10 / 1000**0.5)


def test_ties():
    curve = fit_power_law(measured(MUON, np.random.default_rng(2), 0.003))
    (found,) = ratios(curve, curve, [2.1])
    assert found.value.value == 1 and found.value.low < 0.99 and found.value.high > 1.01


def test_curves_that_share_no_loss():
    high, low = exact((1, 4), (10, 3)), exact((1, 2), (10, 1))
    assert common_losses(high.points, low.points) is None
    assert common_losses(high.points, high.points) == (pytest.approx(3), pytest.approx(4))
    assert projected(high, low, [2.5])[0].value.value > 1


def test_a_law_with_a_floor_never_comes_below_it():
    assert PowerLaw(1.0, 0.1, 2.0).cost(2.0) == inf and PowerLaw(1.0, 1e-4).cost(0.5) > 1e300
