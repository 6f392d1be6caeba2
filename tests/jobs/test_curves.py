"""Runs that have diverged, beside others."""

import math

import pytest

from jobs.bench.curves import best_rate
from jobs.bench.variants import _spread
from jobs.curves import height, plot_losses
from tests.orchestrator.test_journal import recovery
from workers.common.errors import TrainingError


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


def test_a_picture_begins_where_curves_differ_and_holds_all_that_follows():
    falls = [(step, 2 + 3.5 * math.exp(-step)) for step in range(101)]
    low, high = height(falls)
    assert low < 2 and 2 < high < 2.01, "the 5.5 of the beginning is left out"
    assert height([*falls, (90, 7.0)])[1] > 7, "a loss that rises again is not"
    assert height([*falls, (50, math.nan), (60, math.inf)]) == (low, high)
    assert height([]) is None and height([(3, math.nan)]) is None
    assert height([(0, 5.0)])[0] < 5 < height([(0, 5.0)])[1]


def test_any_name_any_losses_and_every_change_can_be_drawn(tmp_path, caplog, recwarn):
    changes = [recovery(step=4, reason="fault", world_size=1), recovery(step=7, reason="grow", world_size=2)]
    losses = [(step, 5.0 - step / 3) for step in range(1, 10)]
    for name in ("_hidden", "$\\frac{", "日本 😀", "[a]", "a\x1b[2Jb"):
        plot_losses({name: (losses, [(0, 5.5), (9, 2.0)])}, tmp_path / "a.png", changes)
        plot_losses({name: ([], [])}, tmp_path / "b.png")
        plot_losses({name: ([(1, math.nan)], [(1, math.inf)])}, tmp_path / "b.png")
    assert not recwarn.list and not caplog.records, "nothing is told of fonts"
    plot_losses({"name": (losses, [(0, 5.5), (9, 2.0)])}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
