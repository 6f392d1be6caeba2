"""QK-Clip against the definition, on whole matrices and on shards of any world size."""

import math
from dataclasses import replace

import pytest
import torch

from optim.config import OptimConfig
from optim.qk_clip import HeadRows, factors
from tests.optim.test_zero1_oracle import CONFIG, SHAPES, Toy, assert_trained, engine_of, targets_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.numeric

HEADS = [
    HeadRows("square", 0, 7, 0, 0.5),
    HeadRows("square", 7, 17, 1, 1.0),
    HeadRows("tall", 5, 30, 1, 0.5),
    HeadRows("wide", 0, 16, 2, 1.0),
]
LOGITS = (400.0, 160.0, 100.0)


def weights(rank: int, world_size: int, config: OptimConfig, logits: tuple[float, ...]) -> dict[str, torch.Tensor]:
    toy = Toy(SHAPES["mixed"])
    engine, optimizer = engine_of(toy, config, heads=HEADS)
    optimizer.max_logits = logits
    engine.backward(engine(targets_of(toy, 0, 0, True)), scale_wrt_gas=False)
    engine.step()
    return {name: parameter.detach().clone() for name, parameter in toy.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_rows_of_heads_over_the_threshold_shrink_and_nothing_else(world_size, name):
    """The same step without QK-Clip, then scaled by hand."""
    config = replace(CONFIG, name=name)
    (expected,) = run_ranks(1, weights, config, LOGITS)
    expected["square"][:7] *= math.sqrt(100 / 400)
    expected["square"][7:] *= 100 / 160
    expected["tall"][5:35] *= math.sqrt(100 / 160)
    for result in run_ranks(world_size, weights, replace(config, qk_clip=100.0), LOGITS):
        for parameter, weight in result.items():
            assert_trained(weight, expected[parameter], parameter, SHAPES["mixed"], config)


def test_only_finite_logits_over_the_threshold_count():
    assert factors([99.0, 100.0, 200.0, math.inf, math.nan, -math.inf], 100.0) == {2: 0.5}
