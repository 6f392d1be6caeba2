"""Matrices without a gradient: they are not moved, whatever their momentum is, and wherever they lie."""

from dataclasses import replace

import pytest
import torch

from optim.config import OptimConfig
from optim.reference import ReferenceMuon
from tests.optim.test_zero1_oracle import Toy, engine_of
from tests.ranks import run_ranks

pytestmark = pytest.mark.numeric

LR = 0.02
CONFIG = OptimConfig(lr=LR, ns_dtype="fp32", wire_dtype="fp32", grad_clip=0)
SHAPES = {"busy": (24, 40), "experts": (6, 12, 20), "wide": (16, 96), "norm": (3,)}
"""At world sizes 2 to 4 some of these matrices straddle partitions."""
RARE = {"experts": [0, 2, 5], "wide": None}
"""What is idle at times: slices of a stack, or a whole parameter."""


def targets_of(toy: Toy, step: int, scale: float, idle_from: int, rest: float) -> dict[str, torch.Tensor]:
    """Return gradients of a scale; from step `idle_from` on those of RARE are multiplied by `rest`."""
    random = torch.Generator().manual_seed(step)
    found = {n: scale * torch.randn(p.shape, generator=random) for n, p in toy.named_parameters()}
    if step >= idle_from:
        for name, slices in RARE.items():
            found[name][slices if slices is not None else slice(None)] *= rest
    return found


def sharded(rank: int, world_size: int, config: OptimConfig, steps: int, *gradients) -> list[dict]:
    """Train; return the weights after each step."""
    toy = Toy(SHAPES)
    engine, optimizer = engine_of(toy, config)
    seen = []
    for step in range(steps):
        engine.backward(engine(targets_of(toy, step, *gradients)), scale_wrt_gas=False)
        engine.step()
        assert not engine.optimizer.overflow
        seen.append({name: parameter.detach().clone() for name, parameter in toy.named_parameters()})
    (momentum,) = (g.tensors["momentum_buffer"] for g in optimizer.flat_state(rank) if "momentum_buffer" in g.tensors)
    seen.append({"momentum": momentum.clone()})
    engine.destroy()
    return seen


def moved(before: torch.Tensor, after: torch.Tensor, weight_decay: float) -> torch.Tensor:
    """Return the root mean square of each matrix's update, over the learning rate."""
    update = (before * (1 - LR * weight_decay) - after) / LR
    return update.view(-1, *update.shape[-2:]).square().mean((-2, -1)).sqrt()


def check_idle(weights: list[dict], idle_from: int, weight_decay: float) -> None:
    for step in range(1, len(weights)):
        for name, parameter in weights[step].items():
            if parameter.dim() < 2:
                continue
            rms = moved(weights[step - 1][name], parameter, weight_decay)
            idle = torch.zeros(len(rms), dtype=torch.bool)
            if name in RARE and step >= idle_from:
                idle[RARE[name] if RARE[name] is not None else slice(None)] = True
            assert (rms[idle] < 1e-5).all(), f"{name} is moved by {rms[idle]} in step {step}"
            assert (rms[~idle] > 0.1).all(), f"{name} is moved by {rms[~idle]} only in step {step}"


@pytest.mark.parametrize("rest", [0.0, 1e-8], ids=["no token came", "rounding alone"])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_an_idle_matrix_is_left_alone_from_the_first_step_on(ranks, scale, rest):
    """Whatever the scale of all gradients is; and as long as a gradient comes, it is moved as any."""
    for *weights, _ in ranks.run(sharded, CONFIG, 7, scale, 3, rest):
        check_idle(weights, 3, CONFIG.weight_decay)


@pytest.mark.parametrize("control", ["adjusted_lr", "update_norm"])
def test_a_momentum_decays_to_the_smallest_float_and_stays_finite(control):
    """From 1e-36 it takes 100 steps to where it cannot become smaller, and from anywhere it comes there."""
    config = replace(CONFIG, momentum=0.8, weight_decay=0.01, ns_dtype="bf16", wire_dtype="bf16", rms_control=control)
    *weights, state = run_ranks(2, sharded, config, 130, 1e-36, 2, 0.0)[0]
    momentum = state["momentum"].abs()
    assert momentum.isfinite().all() and 0 < momentum[momentum > 0].min() < 2e-44
    check_idle(weights, 2, config.weight_decay)


def test_the_reference_leaves_idle_matrices_alone_too():
    stack = torch.nn.Parameter(torch.randn(3, 8, 12))
    optimizer = ReferenceMuon([stack], lr=LR)
    for step in range(6):
        before = stack.detach().clone()
        stack.grad = torch.randn(3, 8, 12)
        stack.grad[1] *= 0.0 if step % 2 else 1e-8
        optimizer.step()
        rms = moved(before, stack.detach(), 0.1)
        assert rms[1] < 1e-5 and rms[0] > 0.1 and rms[2] > 0.1
