"""What `auto` comes to: the fastest that fits, for each number of workers."""

import math
from dataclasses import replace

import pytest

from jobs.load import load
from jobs.planning.choice import SPARE, Decider, decided, deepest, told
from jobs.planning.estimate import Machines, memory_on, needed_on
from jobs.planning.plan import plan_run
from jobs.planning.state import num_blocks
from orchestrator.config import RunConfig
from tests.jobs.planning.test_plan import CPU

GPU = replace(CPU, kind="cuda", precision="bf16")


def config_of(**train) -> RunConfig:
    """A Llama whose activations and logits are most of its memory."""
    config = load("demo-llama", ["model.vocab_size=8192", "train.seq_len=512", "train.global_batch=32"])
    return replace(config, train=replace(config.train, **{"micro_batch": 4, **train}))


def machines_of(nbytes: int, gpus: int = 4) -> Machines:
    return Machines(gpus=gpus, calibration=replace(GPU, memory_bytes=nbytes))


def need_of(config: RunConfig, gpus: int = 4) -> int:
    machines = machines_of(1, gpus)
    return needed_on(memory_on(config, machines, machines.device()), machines, machines.device())


def test_the_less_room_there_is_the_more_is_saved_and_what_is_chosen_fits():
    config = config_of(gradients="whole")
    plain = config.train.plain()
    ways = [{"accumulate": "fp32"}, {}, {"logits": "chunked"}, {"logits": "chunked", "recompute": "4"}]
    needs = [need_of(replace(config, train=replace(plain, **way))) for way in ways]
    assert needs == sorted(needs, reverse=True)
    for room, way in zip(needs, ways, strict=True):
        machines = machines_of(math.ceil(room / (1 - SPARE)))
        found = decided(config, machines)
        assert found.train == replace(plain, **way)
    between = decided(config, machines_of(int((needs[2] + needs[3]) / 2 / (1 - SPARE))))
    assert between.train.logits == "chunked" and 0 < between.train.recomputed(4) < 4
    assert need_of(between) <= (needs[2] + needs[3]) / 2


def test_where_nothing_fits_it_is_what_needs_least():
    config = config_of(micro_batch=0)
    least = decided(config, machines_of(10**6)).train
    assert (least.micro_batch, least.logits, least.gradients, least.recomputed(4)) == (1, "chunked", "partitioned", 4)


def test_a_mixture_of_data_is_no_hindrance(tmp_path):
    path = tmp_path / "mixed.yaml"
    sources = "[{name: a, urls: [a.txt], weight: 1}, {name: b, urls: [b.txt], weight: 2}]"
    path.write_text(f"data:\n  sources: {sources}\n  mixture: [{{step: 5, weights: {{a: 1.0}}}}]\n")
    config = load(str(path), [])
    assert config.data.mixture and not decided(config, machines_of(10**10)).train.open


def test_what_is_set_stays():
    config = config_of(recompute="2", logits="whole", gradients="partitioned", accumulate="weights")
    assert decided(config, machines_of(10**6)) is config
    train = decided(config_of(recompute="none", gradients="whole"), machines_of(10**6)).train
    assert (train.recompute, train.gradients, train.logits) == ("none", "whole", "chunked")


def test_a_choice_holds_for_a_group_about_as_large_while_it_fits():
    config, decide = config_of(micro_batch=0), Decider()
    h100 = ["NVIDIA H100 80GB HBM3"]
    first = decide(config, ["a"] * 8, h100)
    assert not first.open and decide(config, ["a"] * 7, h100) is first, "a recovery does not wait for the plan"
    other = decide(config, ["a"] * 2, h100)
    assert other == decided(config, Machines(gpus=2, gpus_per_node=2, gpu_type="H100")).train
    assert decide(config, ["a"] * 2, ["some other GPU"]) == config.train.plain()
    on_processors = decide(config_of(), ["a", "a", "b"], ["cpu"])
    assert on_processors == replace(config_of().train.plain(), accumulate=on_processors.accumulate)


def test_as_many_layers_as_fit():
    less, more = (need_of(replace(config_of(), train=config_of(micro_batch=size).train.plain())) for size in (2, 4))
    machines = machines_of(int(0.65 * less + 0.35 * more))
    deep = deepest(config_of(micro_batch=0, global_batch=8), machines)  # One sequence at once, or two.
    assert deep.model.num_layers > config_of().model.num_layers
    plan_run(deep, machines).require_fit()
    deeper = replace(deep, model=replace(deep.model, num_layers=deep.model.num_layers + 1))
    assert need_of(decided(deeper, machines)) > (1 - SPARE) * machines.device().memory_bytes


def test_the_16b_moonlight_fits_80_gigabytes():
    """What the flagship is there for; docs/memory.md has 8 and 512 GPUs, too."""
    config = load("moonlight-16b", [])
    plan = plan_run(config, Machines(gpus=64, gpu_type="H100"))
    plan.require_fit()
    assert plan.device.memory_bytes - plan.needed >= 4e9 and plan.mfu >= 0.3
    said = told(plan.config.train, config.train, num_blocks(config.model))
    assert "layers computed again" in said and "chunked logits" in said


@pytest.mark.parametrize("key", ["recompute", "micro_batch"])
def test_nonsense_is_refused_with_what_is_allowed(key):
    from workers.common.errors import ConfigError

    value = {"recompute": "most", "micro_batch": "-1"}[key]
    with pytest.raises(ConfigError, match=f"{key} must be"):
        load("demo", [f"train.{key}={value}"])
