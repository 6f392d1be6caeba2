"""Recipes as data: what a built-in config says is what its paper says."""

import pytest

from jobs.load import load


def test_moonlight_16b_is_the_papers_recipe():
    """ "Muon is Scalable for LLM Training", section 3.3: three stages, the second with a batch that doubles."""
    config = load("moonlight-16b", [])
    recipe, seq_len = config.recipe, config.train.seq_len
    ends = [stage.last for stage in recipe.stages]
    step = max(config.train.batches) * seq_len
    tokens = [recipe.samples_before(end + 1) * seq_len for end in ends]
    assert tokens == pytest.approx([33e9, 200e9, 5.2e12, 5.7e12], abs=step)
    assert config.optim.weight_decay == 0.1 and seq_len == 8192
    warm_up, cosine, grown, cooldown = recipe.stages
    assert 0 < recipe.learning_rate(1) < 1e-6 and warm_up.steps == pytest.approx(2000, rel=0.02)
    assert recipe.learning_rate(warm_up.last) == pytest.approx(4.2e-4)
    assert recipe.learning_rate(grown.last) == pytest.approx(4.2e-5)
    assert recipe.learning_rate(cooldown.first + 99) == pytest.approx(1e-4)
    assert recipe.learning_rate(cooldown.last) == 0
    # One cosine over both batches: half of its tokens are half of its way.
    half = (33e9 + 5.2e12) / 2
    middle = grown.first + round((half - tokens[1]) / step) - 1
    assert recipe.learning_rate(middle) == pytest.approx((4.2e-4 + 4.2e-5) / 2, rel=1e-4)
    assert recipe.learning_rate(cosine.last) == pytest.approx(recipe.learning_rate(grown.first), rel=1e-5)
    assert [stage.global_batch for stage in recipe.stages] == [2048, 2048, 4096, 4096]
    model = config.model
    rates = [model.router_bias_rate if one.router_bias_rate is None else one.router_bias_rate for one in recipe.stages]
    assert rates == [1e-3, 1e-3, 1e-3, 0.0]
