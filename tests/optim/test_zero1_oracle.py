"""The oracle: Muon on ZeRO-1 shards equals the single-process reference on whole matrices."""

import pytest
import torch
from torch import nn

from optim.config import OptimConfig
from optim.layout import GroupLayout
from optim.plan import matrices_of, plan_orthogonalization
from optim.reference import ReferenceMuon
from optim.routing import is_matrix, matrix_shape
from tests.ranks import run_ranks

LR, STEPS, CLIP = 0.02, 5, 0.05
CONFIG = OptimConfig(lr=LR, grad_clip=CLIP, ns_dtype="fp32", wire_dtype="fp32")
SHAPES = {
    # At world size 4 `wide` spans three ranks; `head` (AdamW) is so small that some rank holds none of its group.
    "mixed": {"square": (24, 24), "tall": (40, 8), "wide": (16, 96), "experts": (5, 12, 20), "norm": (3,)},
    "spanning": {"small": (4, 6), "huge": (64, 48), "last": (6, 4), "norm": (1,)},
    "stack": {"experts": (7, 10, 6), "embed_tokens": (11, 5)},
}


class Toy(nn.Module):
    """Parameters of the given shapes; the gradient of each is a fixed random function of step and rank."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=random) * 0.1))

    def forward(self, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((parameter * targets[name]).sum() for name, parameter in self.named_parameters())


def targets_of(toy: Toy, step: int, rank: int, full_rank: bool) -> dict[str, torch.Tensor]:
    """Return gradients of full rank, or of rank one where `full_rank` is off."""
    random = torch.Generator().manual_seed(1000 * step + rank)
    found = {}
    for name, parameter in toy.named_parameters():
        if full_rank or parameter.dim() < 2:
            found[name] = torch.randn(parameter.shape, generator=random)
        else:
            *stack, rows, columns = parameter.shape
            left = torch.randn(*stack, rows, 3, generator=torch.Generator().manual_seed(7))
            found[name] = left @ torch.randn(*stack, 3, columns, generator=torch.Generator().manual_seed(8 + step))
    return found


def sharded(rank: int, world_size: int, shapes: dict, full_rank: bool, config: OptimConfig) -> dict:
    import deepspeed

    from optim.zero1 import Zero1Optimizer
    from workers.config import TrainConfig
    from workers.engine import deepspeed_config, default_device

    device = default_device()
    toy = Toy(shapes).to(device)
    optimizer = Zero1Optimizer(toy.named_parameters(), config)
    settings = deepspeed_config(TrainConfig(), config, torch.device("cpu"), sum(p.numel() for p in toy.parameters()))
    engine, *_ = deepspeed.initialize(model=toy, optimizer=optimizer, config=settings, dist_init_required=False)
    optimizer.bind(engine.optimizer)
    norms = []
    for step in range(STEPS):
        targets = {name: target.to(device) for name, target in targets_of(toy, step, rank, full_rank).items()}
        engine.backward(engine(targets), scale_wrt_gas=False)
        engine.step()
        norms.append(float(engine.optimizer._global_grad_norm))
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in toy.named_parameters()},
        "momentum": [
            group.tensors["momentum_buffer"].numel()
            for group in optimizer.flat_state(rank)
            if "momentum_buffer" in group.tensors
        ],
        "norms": norms,
    }


def reference(world_size: int, shapes: dict, full_rank: bool, config: OptimConfig) -> dict:
    toy = Toy(shapes)
    named = dict(toy.named_parameters())
    matrices = [p for n, p in named.items() if config.name == "muon" and is_matrix(n, tuple(p.shape))]
    others = [p for p in named.values() if not any(p is m for m in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)] if others else []
    if matrices:
        optimizers.append(ReferenceMuon(matrices, lr=LR, weight_decay=0.1, nesterov=config.nesterov))
    for step in range(STEPS):
        for rank in range(world_size):
            (toy(targets_of(toy, step, rank, full_rank)) / world_size).backward()
        torch.nn.utils.clip_grad_norm_(toy.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in named.items()}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("full_rank", [True, False])
def test_equals_the_reference_with_clipping_active(world_size, shapes, full_rank):
    results = run_ranks(world_size, sharded, SHAPES[shapes], full_rank, CONFIG)
    expected = reference(world_size, SHAPES[shapes], full_rank, CONFIG)
    assert min(results[0]["norms"]) > CLIP, "clipping was not active"
    for result in results:
        for name, weight in result["weights"].items():
            assert (weight - expected[name]).abs().max() < (1e-6 if full_rank else 1e-5), name


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(name="adamw", lr=LR, grad_clip=CLIP),
        OptimConfig(lr=LR, grad_clip=CLIP, nesterov=False, ns_dtype="fp32", wire_dtype="fp32"),
    ],
    ids=["adamw", "no nesterov"],
)
def test_other_settings_equal_the_reference(config):
    results = run_ranks(3, sharded, SHAPES["mixed"], True, config)
    expected = reference(3, SHAPES["mixed"], True, config)
    for name, weight in results[0]["weights"].items():
        assert (weight - expected[name]).abs().max() < 1e-6, name


def test_bf16_on_the_wire_stays_near():
    config = OptimConfig(lr=LR, grad_clip=CLIP, ns_dtype="fp32", wire_dtype="bf16")
    results = run_ranks(2, sharded, SHAPES["spanning"], True, config)
    expected = reference(2, SHAPES["spanning"], True, config)
    worst = max((results[0]["weights"][n] - w).abs().max().item() for n, w in expected.items())
    assert 0 < worst < 5 * LR * 0.2 * 2**-7 * STEPS, "bf16 has 8 bits: the error is there, and bounded by the update"


def test_momentum_is_kept_once():
    shapes = SHAPES["mixed"]
    results = run_ranks(3, sharded, shapes, True, CONFIG)
    matrices = sum(torch.Size(shape).numel() for name, shape in shapes.items() if is_matrix(name, shape))
    held = [sum(result["momentum"]) for result in results]
    assert len(set(held)) == 1 and matrices <= sum(held) < matrices + 2 * 3


def test_the_shapes_cover_what_they_claim():
    def layout(key: str, world_size: int) -> GroupLayout:
        names = [name for name, shape in SHAPES[key].items() if is_matrix(name, shape)]
        return GroupLayout.of(names, [torch.Size(SHAPES[key][name]).numel() for name in names], world_size)

    spanning = layout("spanning", 4)
    shapes = [matrix_shape(SHAPES["spanning"][name]) for name in spanning.names]
    plan = plan_orthogonalization(spanning, matrices_of(spanning, shapes))
    assert max(len(matrix.pieces) for matrix in plan.straddlers) >= 3, "a matrix over three ranks"
    norms = GroupLayout.of(["norm"], [1], 4)
    assert not norms.fragments(3), "a rank that holds none of a group"
