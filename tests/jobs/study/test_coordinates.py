"""The coordinate check: which powers of the width it finds, and that a rule of widths passes it where none does not."""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from jobs.load import load
from jobs.study.coordinates import at_width, coordinates
from orchestrator.config import RunConfig, absolute
from tests.forked import context
from tests.workers import test_llama, test_moonlight
from tests.workers.test_loop import TEXT
from workers.common.errors import ConfigError
from workers.models import build

SMALL = [
    *("model.num_layers=1", "model.num_kv_heads=8", "model.intermediate_size=256", f"data.source={TEXT}"),
    *("train.global_batch=8", "train.micro_batch=8", "train.seq_len=64", "data.held_out_fraction=0.2"),
]


def measured(config: RunConfig, steps: int) -> dict[str, tuple[float, float]]:
    from jobs.study.activations import sizes_after
    from workers.data.prepare import prepare

    torch.set_num_threads(1)
    return sizes_after(prepare(config.data), steps, config)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_activations_move_as_far_at_every_width_under_spectral_and_not_under_none(tmp_path, optimizer):
    settings = [f"data.prepared_url={tmp_path}/data", f"optim.name={optimizer}", "optim.lr=8e-3"]
    config = absolute(load("demo-llama", [*SMALL, *settings]))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        train = lambda one: pool.submit(measured, one, 6).result()  # noqa: E731
        found = coordinates(config, (32, 64, 128, 256), ("spectral", "none"), (0,), train)
    powers = {(one.rule, one.name): one.power for one in found}
    names = {"attention logits 1", "residual stream 1", "logits"}
    assert powers.keys() == {(rule, name) for rule in ("spectral", "none") for name in names}
    assert all(abs(powers["spectral", name]) < 0.2 for name in names), powers
    assert all(powers["none", name] > 0.3 for name in names), powers
    at_base = [one for one in found if one.name == "logits"]
    assert at_base[0].change[0] == at_base[1].change[0], "at the base width a rule changes nothing"


def exactly(rules: dict[str, float], config: RunConfig) -> dict[str, tuple[float, float]]:
    size = config.model.hidden_size / config.optim.base_width
    noise = 1 + 0.2 * (-1) ** config.seed
    return {"a": (1.0, noise * size ** rules[config.optim.width_rule]), "b": (2.0, 0.0)}


def test_powers_verdicts_and_seeds():
    config, train = load("demo", []), partial(exactly, {"none": 0.5, "rms": -0.3, "spectral": 0.1, "essential": -0.2})
    found = coordinates(config, (32, 64, 128), ("none", "rms", "spectral", "essential"), (0, 1), train)
    a = {one.rule: one for one in found if one.name == "a"}
    assert {rule: round(one.power, 6) for rule, one in a.items()} == {
        "none": 0.5,
        "rms": -0.3,
        "spectral": 0.1,
        "essential": -0.2,
    }
    assert [one.verdict for one in a.values()] == ["grows", "shrinks", "flat", "unclear"]
    assert a["none"].change[0] == pytest.approx(math.sqrt(1.2 * 0.8)), "a geometric mean over the seeds"
    assert a["none"].rms == pytest.approx((1, 1, 1)) and a["none"].widths == (32, 64, 128)
    assert all(one.verdict == "flat" for one in found if one.name == "b"), "nothing has moved"
    assert json.dumps(a["none"].as_dict())


@pytest.mark.parametrize("config", [test_moonlight.TINY, test_llama.TINY], ids=["moonlight", "llama"])
def test_what_is_seen_are_the_models_own_activations(config):
    from jobs.study.activations import seen
    from workers.models.attention import take_logits, watch
    from workers.objective import batch_of

    torch.manual_seed(0)
    model = build(config).train()
    batch = batch_of(torch.randint(256, (2, 17)))
    watch(model, True)
    found = seen(model, batch)
    assert found["logits"].shape == (2, 16, 256)
    largest = take_logits(model).largest.view(config.num_layers, config.num_heads)
    for number in range(config.num_layers):
        scores = found[f"attention logits {number + 1}"].tril() + torch.full((16, 16), -math.inf).triu(1)
        torch.testing.assert_close(scores.amax((0, 2, 3)), largest[number], rtol=1e-4, atol=1e-6)
    stream = found[f"residual stream {config.num_layers}"]
    torch.testing.assert_close(torch.nn.functional.linear(model.model.norm(stream), model.head), found["logits"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_at_another_width():
    model = load("demo", []).model
    wide = at_width(model, 512)
    assert (wide.hidden_size, wide.num_heads, wide.intermediate_size, wide.moe_intermediate_size) == (
        512,
        16,
        1408,
        384,
    )
    assert replace(wide, hidden_size=128, num_heads=4, intermediate_size=352, moe_intermediate_size=96) == model
    with pytest.raises(ConfigError, match=r"--width 36: .*model.num_heads=4 would be 1.125"):
        at_width(model, 36)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["demo", "--rule", "muP"], "--rule muP: is none; known are none, rms, spectral, essential"),
        (["demo", "--width", "64"], "two or more"),
        (["demo-llama"], "model.num_kv_heads=2 would be 0.5"),
        (["demo", "optim.weight_decay=3", "optim.lr=0.03", "optim.base_width=512"], "at width 32 a step would take"),
    ],
)
def test_what_cannot_be_checked_is_told_before_anything_trains(arguments, problem, tmp_path):
    settings = [f"data.prepared_url={tmp_path}", f"data.source={TEXT}", "data.held_out_fraction=0.2"]
    result = CliRunner().invoke(app, ["study", "coordinates", *arguments, *settings])
    assert isinstance(result.exception, ConfigError) and problem in str(result.exception)
