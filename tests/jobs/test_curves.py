"""Runs that have diverged, beside others."""

import math

from jobs.curves import height, plot_losses
from tests.orchestrator.test_journal import recovery


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
