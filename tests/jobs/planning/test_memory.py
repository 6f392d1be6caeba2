"""The planned memory against that of real passes and real ranks, with each way to save some."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from jobs.bench.plan import FIXED
from jobs.bench.plan_memory import BEFORE_AND_AFTER, compare, variants
from jobs.load import load
from jobs.planning.state import num_blocks
from jobs.planning.work import Blocks, micro_batch_of
from orchestrator.config import RunConfig
from tests.ranks import run_ranks

SMALL = ["model.num_layers=3", "train.global_batch=8", "train.micro_batch=2", "train.seq_len=256"]


def profiled_peak(rank: int, world_size: int, config: RunConfig) -> int:
    """Return the bytes of all tensors at the worst moment of a real micro-batch, as torch's allocator counts them."""
    from workers.models import build
    from workers.models.recompute import recompute
    from workers.objective import batch_of, summed_loss

    model, train = build(config.model), config.train
    recompute(model, train.recomputed(len(model.blocks)))
    batch = batch_of(torch.randint(256, (train.micro_batch, train.seq_len + 1)))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        summed_loss(model(*batch.given), model.head, batch.targets, train.logits == "chunked").backward()
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("recomputed", "logits"), [("none", "whole"), ("none", "chunked"), ("all", "chunked")])
def test_a_micro_batch_takes_what_torchs_allocator_counts(recomputed, logits):
    ways = [f"train.recompute={recomputed}", f"train.logits={logits}", "model.vocab_size=4096"]
    config = load("demo-llama", [*SMALL, *ways])
    (real,) = run_ranks(1, profiled_peak, config)
    layers = config.train.recomputed(num_blocks(config.model))
    planned = micro_batch_of(
        *(config.model, 2, 256, torch.float32, "cpu"), recomputed=layers, chunked=logits == "chunked"
    )
    assert planned.peak == pytest.approx(real, rel=0.03)


def test_ranks_grow_as_planned():
    """Of 725 MB the bucket is 146, and what a rank keeps, kept before, and has as master weights 73 each."""
    size = [
        *("model.hidden_size=512", "model.head_dim=64", "model.vocab_size=32768", "model.num_layers=2"),
        *("model.intermediate_size=512", "train.seq_len=64", "train.micro_batch=1", "train.global_batch=4"),
    ]
    ways = ["train.recompute=all", "train.gradients=partitioned", "train.logits=chunked", "train.accumulate=weights"]
    found = compare(load("demo-llama", [*size, *ways, *FIXED]), ranks=2)
    assert found["ratio"] == pytest.approx(1, abs=0.1), found


def test_the_bench_measures_each_combination_and_all_against_nothing():
    large = [tuple(ways.values()) for name, _, _, ways in variants() if name == "large"]
    assert len(set(large)) == len(large) == 8
    rest = [(name, *ways.values()) for name, _, _, ways in variants() if name != "large"]
    assert rest == [
        (name, *ways)
        for name in BEFORE_AND_AFTER
        for ways in (("none", "whole", "whole"), ("all", "partitioned", "chunked"))
    ]


def test_the_heap_grows_by_large_blocks_that_find_room_in_it():
    assert Blocks(small=100, fitting=130, large=500).heap == 130
    assert Blocks(small=100, fitting=400, large=500).heap == 200, "by no more than it had"
