"""What `raymuon plan` says of the 16B Moonlight; the figures stand in docs/optimizer.md."""

import pytest

from jobs.load import load
from jobs.planning.matrices import orthogonalization
from workers.common.errors import ConfigError


@pytest.mark.parametrize(("gpus", "straddlers", "megabytes"), [(8, 7, 11), (64, 63, 97), (512, 511, 786)])
def test_the_plan_of_the_16b_moonlight(gpus, straddlers, megabytes):
    plan = orthogonalization(load("moonlight-16b", []), gpus)
    assert plan.matrices == 5207 and plan.straddlers == straddlers
    assert plan.bytes_each_way <= megabytes * 1e6
    assert plan.worst_share_of_all_gather < 1e-3
    assert 1 <= plan.imbalance < 1.5


def test_thousands_of_ranks_and_one():
    config = load("moonlight-16b", [])
    many, one = orthogonalization(config, 4096), orthogonalization(config, 1)
    assert many.operations == one.operations == one.worst_operations and many.straddlers <= 4095
    assert (one.straddlers, one.bytes_each_way, one.worst_share_of_all_gather) == (0, 0, 0)


def test_nothing_to_plan():
    with pytest.raises(ConfigError, match="optim.name=adamw: no matrix is orthogonalized"):
        orthogonalization(load("demo", ["optim.name=adamw"]), 2)
