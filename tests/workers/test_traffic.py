"""What is counted against what was called."""

import pytest
import torch
import torch.distributed as dist

from tests.optim.test_zero1_oracle import CONFIG, Toy, engine_of, targets_of
from tests.ranks import run_ranks
from workers.traffic import Traffic


def collectives(rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """Call each collective once or twice on 30 fp32 elements or a share of them."""
    whole, part = torch.ones(30), torch.ones(30 // world_size)
    splits = [30 * (peer + 1) for peer in range(world_size)]  # More for higher ranks.
    with Traffic() as traffic:
        dist.all_reduce(whole)
        dist.all_reduce(whole.bfloat16())
        dist.all_gather_into_tensor(whole, part)
        dist.all_gather(list(whole.chunk(world_size)), part)
        dist.reduce_scatter_tensor(part, whole)
        dist.reduce(whole, 1)
        dist.broadcast(whole, 0)
        dist.all_to_all_single(whole.clone(), whole, async_op=True).wait()
        dist.all_to_all_single(
            torch.empty(world_size * splits[rank]), torch.ones(sum(splits)), [splits[rank]] * world_size, splits
        )
        dist.barrier()
    dist.all_reduce(whole)
    return {name: (traffic.calls[name], sent) for name, sent in traffic.sent.items()}


@pytest.mark.parametrize(
    ("world_size", "once", "all_to_all"),
    [(2, 60, [60 + 240, 60 + 120]), (3, 80, [80 + 600, 80 + 480, 80 + 360])],
    ids=["2 ranks", "3 ranks"],
)
def test_the_bytes_of_every_collective(world_size, once, all_to_all):
    """Once round the ring, 120 bytes make each rank send `once`."""
    for exact, found in zip(all_to_all, run_ranks(world_size, collectives), strict=True):
        assert found == {
            "all_reduce": (2, 2 * once + once),
            "all_gather": (2, 2 * once),
            "reduce_scatter": (1, once),
            "reduce": (1, once),
            "broadcast": (1, once),
            "all_to_all": (2, exact),
        }


def what_has_no_formula(rank: int, world_size: int) -> tuple[dict, dict]:
    with Traffic() as traffic:
        dist.gather(torch.ones(1), [torch.ones(1)] * world_size if rank == 0 else None)
    return dict(traffic.calls), dict(traffic.uncounted)


def test_what_has_no_formula_is_named():
    assert run_ranks(2, what_has_no_formula) == [({}, {"gather_": 1})] * 2


def step_of_zero1(rank: int, world_size: int) -> dict[str, int]:
    toy = Toy({"matrix": (24, 24), "small": (6, 12), "norm": (36,)})
    engine, _ = engine_of(toy, CONFIG)
    with Traffic() as traffic:
        for micro in range(2 + rank):
            engine.backward(engine(targets_of(toy, micro, rank, True)), scale_wrt_gas=False)
        engine.step()
    return dict(traffic.sent)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_sends_each_gradient_to_its_owner_once(world_size):
    """However many micro-batches a rank runs; DeepSpeed's default would send twice as much."""
    weights, norm = 4 * (24 * 24 + 6 * 12 + 36), 4
    straddlers = world_size > 1  # The larger matrix alone.
    gradients = 8 * (1 + straddlers)  # How large they are, in fp64.
    for sent in run_ranks(world_size, step_of_zero1):
        assert sent["reduce"] == sent.get("all_gather", 0) == weights * (world_size - 1) // world_size
        rounds = [norm, norm, gradients]
        assert sent["all_reduce"] == sum(2 * size * (world_size - 1) // world_size for size in rounds)
