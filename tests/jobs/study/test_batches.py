"""Tokens to a loss, ratios, critical batches and schedules, against curves with known answers."""

from math import inf, isnan, nan, sqrt

import numpy as np
import pytest

from jobs.study.fits.batch import (
    Place,
    batch_schedule,
    branched_critical,
    pareto,
    smoothed,
    token_optimal,
    token_ratios,
    tokens_to,
)
from jobs.study.fits.critical import TwoPiece, fit_two_piece
from jobs.study.fits.estimate import Estimate, Unidentified

BATCHES = [1024 * 2**k for k in range(6)]


def model(critical: float, slope: float, tokens: float = 1e6) -> TwoPiece:
    return TwoPiece(Estimate(critical, nan, nan), tokens, slope)


def drawn(truth: TwoPiece, rng: np.random.Generator, noise: float, seeds: int, batches=BATCHES):
    return {batch: list(truth.tokens_at(batch) * np.exp(rng.normal(0, noise, seeds))) for batch in batches}


def test_a_loss_is_reached_on_the_line_between_two_records():
    curve = [(100, 4.0), (200, 3.0), (300, 3.5), (400, 2.0)]
    assert tokens_to(curve, 3.25) == pytest.approx(100 * 2**0.75)  # For the first time.
    assert tokens_to(curve, 2.9) == pytest.approx(300 * (4 / 3) ** (0.6 / 1.5))
    assert tokens_to([(0, 5.0), *curve], 4.5) == 50
    assert (tokens_to(curve, 3.0), tokens_to(curve, 2.0)) == (200, 400)
    assert (tokens_to(curve, 5.0), tokens_to(curve, 1.9), tokens_to([], 1.0)) == (100, None, None)


def test_smoothing_lags_by_the_same_tokens_at_every_batch():
    line = {batch: [(t, 10 - t / 1e6) for t in range(batch, 2_000_001, batch)] for batch in (1000, 10_000, 100_000)}
    lags = {
        batch: np.interp(8.5, [one[1] for one in smoothed(of, 0.95, 10_000)][::-1], [one[0] for one in of][::-1])
        - 1.5e6
        for batch, of in line.items()
    }
    # -1 / ln 0.95 = 19.5 times 10,000; what a batch's own mean lags behind is not more than a batch.
    assert all(abs(lag - 195_000) <= batch for batch, lag in lags.items()), lags
    assert smoothed(line[1000], 0.0, 1) == line[1000] and smoothed([], 0.5, 1) == []


def test_token_optimal_batch():
    tokens = {1: 100.0, 2: 99.0, 4: 100.9, 8: 101.5, 16: None}
    assert token_optimal(tokens) == 4
    assert token_optimal(tokens, tolerance=0) == 2
    assert token_optimal({1: 5.0, 2: 5.0}) == 2 and token_optimal({1: None}) is None and token_optimal({}) is None


@pytest.mark.parametrize("seeds, noise", [((2, 2), (0.02, 0.02)), ((3, 2), (0.05, 0.01)), ((4, 4), (0.001, 0.1))])
def test_ratios_cover_the_truth(seeds, noise):
    rng, hits = np.random.default_rng(0), 0
    first, second = model(4000, -0.3, 1.5e6), model(9000, -0.4)
    for _ in range(200):
        found = token_ratios(drawn(first, rng, noise[0], seeds[0]), drawn(second, rng, noise[1], seeds[1]))
        hits += sum(first.tokens_at(batch) / second.tokens_at(batch) in found[batch] for batch in BATCHES)
    assert 0.92 <= hits / 200 / len(BATCHES) <= 0.98


def test_ratios_of_what_was_not_repeated_or_not_reached():
    found = token_ratios({1: [20.0], 2: [30.0], 4: []}, {1: [10.0], 2: [], 4: [5.0]})
    assert set(found) == {1} and found[1].value == pytest.approx(2) and isnan(found[1].low)
    same = token_ratios({1: [20.0, 20.0]}, {1: [20.0, 20.0]})[1]
    assert (same.value, same.low, same.high) == (1, 1, 1)


@pytest.mark.parametrize(
    "critical, slope, noise, seeds",
    [(6000, -0.4, 0.02, 2), (6000, -0.4, 0.02, 1), (4000, -0.7, 0.01, 3), (9e3, -0.2, 0.05, 2)],
)
def test_two_pieces_cover_the_truth(critical: float, slope: float, noise: float, seeds: int):
    truth, rng = model(critical, slope), np.random.default_rng(seeds)
    found = [fit_two_piece(drawn(truth, rng, noise, seeds)) for _ in range(200)]
    assert sum(critical in one.critical for one in found) >= 0.91 * 200
    assert np.median([one.critical.high / one.critical.low for one in found]) < 2  # And it tells something.


def test_exact_two_pieces():
    for batches, truth in ((BATCHES, model(5000, -0.5)), ([1, 2, 4, 8, 16, 32], model(5, -0.05, 7.0))):
        found = fit_two_piece(drawn(truth, np.random.default_rng(0), 0, 1, batches))
        assert found.critical.value == pytest.approx(truth.critical.value, rel=2e-3)
        assert (found.slope, found.tokens) == (
            pytest.approx(truth.slope, abs=0.01),
            pytest.approx(truth.tokens, rel=1e-3),
        )
        assert found.steps_at(batches[0]) == pytest.approx(truth.tokens / batches[0], rel=1e-3)


def test_a_knee_near_the_ends_is_left_open():
    rng = np.random.default_rng(0)
    assert fit_two_piece(drawn(model(1100, -0.4), rng, 0.02, 2)).critical.low == 0
    late = {batch: [1e6 * rise for rise in (1, 1.01)] for batch in BATCHES[:-1]} | {BATCHES[-1]: [1.1e6, 1.11e6]}
    assert fit_two_piece(late).critical.low < BATCHES[-2] < fit_two_piece(late).critical.high < BATCHES[-1]


@pytest.mark.parametrize(
    "tokens, reason",
    [
        (drawn(model(1e9, -0.5), np.random.default_rng(0), 0.02, 2), "critical batch is beyond it"),
        ({batch: [1e6 - batch] for batch in BATCHES}, "critical batch is beyond it"),  # It even falls.
        ({batch: [1e6] for batch in BATCHES}, "critical batch is beyond it"),
        ({1: [1.0], 2: [1.0], 4: [2.0], 8: []}, "4 batches that come to the loss, not 3"),
    ],
)
def test_no_critical_batch(tokens, reason):
    with pytest.raises(Unidentified, match=reason):
        fit_two_piece(tokens)


def test_pareto_leaves_out_what_is_beaten():
    places = [Place(1, 8, 100), Place(2, 8, 80), Place(4, 16, 80), Place(8, 16, 60), Place(16, 32, 70)]
    assert pareto(places) == [Place(2, 8, 80), Place(8, 16, 60)]
    assert pareto([]) == []


def test_critical_batch_by_branches():
    assert branched_critical({8: 3.0, 16: 3.005, 32: 3.009, 64: 3.02, 128: 3.2}) == 32
    assert branched_critical({8: 3.0, 16: 2.9, 32: 2.905, 64: 2.92}) == 32  # The best of the smaller ones is 2.9.
    assert branched_critical({8: 3.0, 16: 3.1, 32: 3.0}) == 8  # That 32 is back is chance.
    assert branched_critical({8: 3.0, 16: nan, 32: inf}) == 8 and branched_critical({8: nan, 16: 3.0}) == 8
    assert branched_critical({64: 3.0, 8: 3.0}) == 64


def test_batch_schedule_doubles_where_the_critical_one_is_above_twice():
    found = batch_schedule({2e6: 9, 1e6: 8, 4e6: 40, 5e6: 41, 6e6: 20}, smallest=4)
    assert [(one.tokens, one.batch) for one in found] == [(0, 4), (2e6, 8), (4e6, 32)]
    assert [one.rate_factor for one in found] == [1, sqrt(2), sqrt(8)]
    assert [one.batch for one in batch_schedule({}, 4)] == [4]
