from itertools import pairwise

import pytest

from optim.checks import ConfigProblems
from optim.config import OptimConfig


def test_cosine_warms_up_peaks_and_ends_at_the_final_rate():
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_fraction=0.1)
    rates = [config.curve(100).at(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert rates[54] == pytest.approx(0.55)  # Half-way between warm-up and end.
    assert rates[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))


def test_wsd_is_flat_then_falls_in_a_line():
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_lr_fraction=0.0)
    rates = [config.curve(100).at(step) for step in range(1, 101)]
    assert set(rates[9:80]) == {1.0}
    assert rates[89] == pytest.approx(0.5) and rates[99] == 0.0


def test_a_warm_up_longer_than_the_run_is_a_line():
    assert OptimConfig(lr=1.0, warmup_steps=20).curve(10).at(5) == 0.25


@pytest.mark.parametrize(
    ("settings", "steps", "told"),
    [
        ({"warmup_steps": 20}, 10, "the learning rate ends at 0.50 of the peak"),
        ({"warmup_steps": 1}, 1, "the learning rate ends at 1.00 of the peak"),
        ({"warmup_steps": 9}, 10, ""),
        ({}, 1, ""),
        ({"schedule": "wsd", "decay_fraction": 1.0}, 10, ""),
        ({"schedule": "wsd", "decay_fraction": 0.2, "warmup_steps": 8}, 10, ""),
        (
            {"schedule": "wsd", "decay_fraction": 0.8, "warmup_steps": 5},
            10,
            "falls from the peak to 0.55 of it",
        ),
        ({"schedule": "wsd", "decay_fraction": 0.8, "warmup_steps": 10}, 10, "the learning rate ends at 1.00"),
    ],
)
def test_what_a_short_run_leaves_out_of_its_schedule_is_told(settings, steps, told):
    found = OptimConfig(lr=0.5, **settings).curve(steps).cut_short()
    assert told in found and bool(told) == bool(found)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigProblems) as raised:
        OptimConfig(lr=-1, momentum=1.0, ns_steps=0)
    assert [problem.split()[0] for problem in raised.value.problems] == ["lr", "momentum", "ns_steps"]
