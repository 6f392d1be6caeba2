"""The formulas against a simulation that knows nothing of them."""

import math
import random

import pytest

from jobs.planning.goodput import Failures, best_interval, failures_of, goodput, useful_share


def simulated(failures: Failures, step: float, snapshot: float, snapshots: int, checkpoints: int, steps: int) -> float:
    """Run `steps` steps with failures of both kinds and return the useful share of the time."""
    draw = random.Random(7)
    now, done, in_keepers, in_storage = 0.0, 0, 0, 0
    worker, head = (draw.expovariate(1 / mtbf) for mtbf in (failures.worker_mtbf_s, failures.head_mtbf_s))
    while done < steps:
        cost = step + (snapshot if (done + 1) % snapshots == 0 else 0.0)
        if min(worker, head) > now + cost:
            now, done = now + cost, done + 1
            in_keepers = done if done % snapshots == 0 else in_keepers
            in_storage = done if done % checkpoints == 0 else in_storage
            continue
        now = min(worker, head)
        while True:  # A failure during the recovery begins it anew.
            if now == head:
                done = in_keepers = in_storage
                head, recovery = now + draw.expovariate(1 / failures.head_mtbf_s), failures.head_recovery_s
            else:
                done = in_keepers
                worker, recovery = now + draw.expovariate(1 / failures.worker_mtbf_s), failures.worker_recovery_s
            if min(worker, head) > now + recovery:
                now += recovery
                break
            now = min(worker, head)
    return steps * step / now


@pytest.mark.parametrize(
    ("worker", "head", "snapshots", "checkpoints"), [(500, 1e9, 5, 20), (1e9, 3000, 1, 30), (300, 4000, 4, 40)]
)
def test_the_expected_goodput_is_that_of_a_simulation(worker, head, snapshots, checkpoints):
    failures = Failures(worker_mtbf_s=worker, head_mtbf_s=head, worker_recovery_s=3.0, head_recovery_s=60.0)
    found = goodput(failures, 2.0, 0.5, snapshots, checkpoints, 10**6, upload_s=1.0)
    assert found.share == pytest.approx(simulated(failures, 2.0, 0.5, snapshots, checkpoints, 60_000), abs=0.015)
    assert found.share < found.best_share < 1


@pytest.mark.parametrize(("cost", "mtbf"), [(1, 1000), (5, 5000), (30, 600), (0.1, 1e6)])
def test_no_other_interval_wastes_less(cost, mtbf):
    best = best_interval(cost, mtbf)
    share = useful_share(best, cost, mtbf, 10)
    others = [useful_share(best * factor, cost, mtbf, 10) for factor in (0.5, 0.8, 1.25, 2)]
    assert all(other < share for other in others)
    assert best == pytest.approx(math.sqrt(2 * cost * mtbf), rel=0.3), "Young's, to first order"


def test_where_saving_costs_more_than_failing():
    assert best_interval(100, 40) == 40
    assert useful_share(1e9, 1, 1.0, 1) == 0.0


def test_more_gpus_fail_more_often():
    few, many = (failures_of(10_000, gpus, 8, 10**9, 1e9) for gpus in (8, 512))
    assert few.worker_mtbf_s == 64 * many.worker_mtbf_s and few.head_mtbf_s == many.head_mtbf_s
    assert few.worker_recovery_s == pytest.approx(2.33 + 1)


def test_a_checkpoint_waits_for_the_one_before():
    failures = Failures(worker_mtbf_s=1e5, head_mtbf_s=1e5, worker_recovery_s=3, head_recovery_s=60)
    found = goodput(failures, 2.0, 0.0, 1, 100, 1000, upload_s=30)
    assert (found.best_snapshot_every, found.best_checkpoint_every) == (1, 15)
