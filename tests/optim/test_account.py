"""The account of a step: what travels, what is computed and what is kept is what the plan says, to the element."""

import pytest
import torch

from optim.assignment import matrices_of, plan_orthogonalization
from optim.config import OptimConfig
from optim.layout import GroupLayout
from optim.routing import is_matrix
from tests.optim.test_zero1_oracle import SHAPES, TABLES, Toy, engine_of, targets_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.numeric


def counted(rank: int, world_size: int, shapes: dict, config: OptimConfig) -> dict:
    """Train two steps; count in the second one what goes through the collectives and through Newton-Schulz."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_optimizer_state

    import optim.exchange

    toy = Toy(shapes)
    engine, optimizer = engine_of(toy, config)
    sent, matrices = [], []
    all_to_all, newton_schulz = dist.all_to_all_single, optim.exchange.newton_schulz

    def counting_all_to_all(output, input, output_sizes, input_sizes, **options):
        assert input_sizes[rank] == 0, "nobody sends to itself"
        sent.append((input.numel(), input.element_size()))
        return all_to_all(output, input, output_sizes, input_sizes, **options)

    def counting_newton_schulz(x, *arguments):
        matrices.extend([tuple(x.shape[-2:])] * x.shape[0])
        return newton_schulz(x, *arguments)

    full = {}
    for step in range(2):
        if step:
            dist.all_to_all_single, optim.exchange.newton_schulz = counting_all_to_all, counting_newton_schulz
        engine.backward(engine(targets_of(toy, step, rank, True)), scale_wrt_gas=False)
        engine.step()
        if not step:
            for name, parameter in toy.named_parameters():
                key = "momentum_buffer" if is_matrix(name, tuple(parameter.shape), TABLES) else "exp_avg"
                full[name] = safe_get_full_optimizer_state(parameter, key)
    dist.all_to_all_single, optim.exchange.newton_schulz = all_to_all, newton_schulz
    (shard,) = optimizer.param_groups[0]["params"]
    engine.destroy()
    return {
        "sent": sent,
        "matrices": matrices,
        "plan": (optimizer.exchange.plan.elements_sent()[rank], sorted(optimizer.exchange.plan.matrices(rank))),
        "momentum": optimizer.state[shard]["momentum_buffer"].numel(),
        "partition": shard.numel(),
        "full": {name: (tuple(state.shape), bool(state.any())) for name, state in full.items()},
    }


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("shapes", ["mixed", "spanning"])
def test_the_account_of_a_step(ranks, shapes, wire):
    config = OptimConfig(lr=0.02, ns_dtype="fp32", wire_dtype=wire)
    results = ranks.run(counted, SHAPES[shapes], config)
    for result in results:
        planned, matrices = result["plan"]
        assert sum(count for count, _ in result["sent"]) == planned
        assert {size for _, size in result["sent"]} <= {4 if wire == "fp32" else 2}
        assert sorted(result["matrices"]) == matrices
        assert result["momentum"] == result["partition"]
        assert result["full"] == {name: (shape, True) for name, shape in SHAPES[shapes].items()}
    done = sorted(shape for result in results for shape in result["matrices"])
    expected = sorted(
        tuple(shape[-2:])
        for name, shape in SHAPES[shapes].items()
        if is_matrix(name, shape, TABLES)
        for _ in range(shape[0] if len(shape) == 3 else 1)
    )
    assert done == expected, "every matrix once in the whole group"


def descended(
    rank: int, world_size: int, stacks: list[tuple[int, int, int]], flat: torch.Tensor, form: str
) -> torch.Tensor:
    """Carry the plan out on this rank's part of a direction; return its part of the weights, which were zero."""
    import torch.distributed as dist

    from optim.exchange import Exchange

    names = [f"p{i}" for i in range(len(stacks))]
    layout = GroupLayout.of(names, [e * a * b for e, a, b in stacks], world_size)
    config = OptimConfig(ns_dtype="fp32", wire_dtype="fp32", ns_form=form, momentum=0, nesterov=False, update_rms=1)
    plan = plan_orthogonalization(layout, matrices_of(layout, [[(a, b)] * e for e, a, b in stacks]), config.operations)
    padded = torch.cat([flat, torch.zeros(world_size * layout.partition - flat.numel())])
    mine = padded[rank * layout.partition : (rank + 1) * layout.partition].clone()
    shard = torch.zeros_like(mine)
    exchange = Exchange(plan, config, dist.group.WORLD, torch.device("cpu"))
    exchange.step(shard, mine, torch.zeros_like(mine), lr=1.0, weight_decay=0.0)
    return shard


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_the_update_is_bitwise_the_same_for_every_layout(form):
    stacks = [(5, 12, 20), (1, 33, 7), (1, 64, 48), (3, 12, 20), (1, 9, 40), (2, 7, 7), (1, 2, 300)]
    numel = sum(e * a * b for e, a, b in stacks)
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(4))
    (alone,) = run_ranks(1, descended, stacks, flat, form)
    assert torch.count_nonzero(alone) > 0.99 * numel
    for world_size in (2, 3, 4):
        together = torch.cat(run_ranks(world_size, descended, stacks, flat, form))
        assert torch.equal(together[:numel], alone[:numel]), f"world size {world_size}"
        assert not together[numel:].any(), "the padding stays zero"
