"""Runs that have diverged, beside others."""

import math

import pytest

from jobs.bench.curves import best_rate
from jobs.bench.variants import _spread
from workers.errors import TrainingError


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_rate_that_diverged_is_not_the_best(bad):
    for losses in ([bad, 2.0, 1.0], [2.0, bad, 1.0], [2.0, 1.0, bad]):
        rates = dict(zip((0.1, 0.2, 0.3), losses, strict=True))
        assert rates[best_rate(rates)] == 1.0
    with pytest.raises(TrainingError, match=r"no learning rate of 0.1, 0.2 has a finite loss"):
        best_rate({0.1: bad, 0.2: bad})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_spread_of_seeds_of_which_one_diverged_is_no_number(bad):
    assert all(map(math.isnan, _spread("val_loss", [1.0, bad, 2.0]).values()))
    assert _spread("val_loss", [1.0, 3.0]) == {"val_loss_mean": 2.0, "val_loss_std": pytest.approx(2**0.5)}
