"""`bench model`: what is compared is the same, and what is told is the worse of both configs."""

import pytest
import torch

from jobs.bench.model import summary
from jobs.bench.model_step import agree, in_turns, like_and_dense, main
from jobs.load import load, plain_yaml
from tests.workers import test_llama, test_moonlight
from workers.common.errors import TrainingError
from workers.models import build


def test_the_worse_config_counts():
    reports = {
        "demo": {"ratio_to_transformers": 1.5, "ratio_compiled": 0.9, "moe_over_dense": 1.4},
        "demo-llama": {"ratio_to_transformers": 1.1, "ratio_compiled": 1.2},
    }
    assert summary(reports) == {"ratio_to_transformers": 1.1, "ratio_compiled": 0.9, "moe_over_dense": 1.4}
    assert "moe_over_dense" not in summary({"demo-llama": reports["demo-llama"]})


def test_another_loss_is_no_comparison():
    assert list(agree({"ours": lambda: 2.0, "theirs": lambda: 2.0001})) == ["ours", "theirs"]
    for loss in (2.001, float("nan")):
        with pytest.raises(TrainingError, match="another loss than 2.0: {'theirs'"):
            agree({"ours": lambda: 2.0, "theirs": lambda loss=loss: loss})


def test_a_round_has_a_step_of_each_and_a_way_far_slower_is_left_out(monkeypatch):
    clock, steps = [0.0], {}
    monkeypatch.setattr("jobs.bench.model_step.time.process_time", lambda: clock[0])
    for name, taken in {"ours": 1.0, "theirs_eager": 3.0, "theirs_batched_mm": 40.0}.items():

        def step(taken: float = taken) -> float:
            clock[0] += taken
            return 0.0

        steps[name] = step
    assert in_turns(steps, 3) == {"ours": 1.0, "theirs_eager": 3.0}


def test_a_dense_model_has_the_parameters_that_a_token_visits():
    made = {name: build(config) for name, config in like_and_dense(test_moonlight.TINY).items()}
    config = test_moonlight.TINY
    visited, routers = config.num_experts_per_token / config.num_experts, config.num_experts * config.hidden_size
    active = {
        name: sum(p.numel() * (visited if p.dim() == 3 else 1) for p in model.parameters())
        for name, model in made.items()
    }
    assert active["mixture"] - routers == pytest.approx(active["dense"])


@pytest.mark.parametrize("name", ["moonlight", "llama"])
def test_both_sides_have_one_loss(tmp_path, monkeypatch, capfd, name):
    """Nothing is compiled here, which takes a minute."""
    told = {}
    monkeypatch.setattr("jobs.bench.model_step.tell", told.update)
    monkeypatch.setattr("jobs.bench.model_step.compile_layers", lambda model: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: None)
    config = load("demo" if name == "moonlight" else "demo-llama", ["train.micro_batch=2", "train.seq_len=16"])
    path = tmp_path / "config.yaml"
    tiny = {"moonlight": test_moonlight.TINY, "llama": test_llama.TINY}[name]
    path.write_text(plain_yaml(type(config)(**{**{f: getattr(config, f) for f in config.__slots__}, "model": tiny})))
    main(str(path), 2, str(tmp_path))
    assert told["ratio_to_transformers"] > 0 and ("moe_over_dense" in told) == (name == "moonlight")
