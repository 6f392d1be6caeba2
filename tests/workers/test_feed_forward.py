"""The feed-forward layers' own backward passes, against autograd over plain ops."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.closeness import assert_close
from workers.models.experts import MixtureOfExperts
from workers.models.feed_forward import Routes, grouped_product, lean_swiglu_product, plain_swiglu, swiglu_product
from workers.models.recompute import recompute

pytestmark = pytest.mark.numeric

WIDTH, INNER, EXPERTS = 24, 16, 5


def plain_experts(x: Tensor, gates: Tensor, chosen: Tensor, weights: list[Tensor]) -> Tensor:
    """Return what each token's experts make of it, expert by expert."""
    gate_proj, up_proj, down_proj = weights
    parts = []
    for token in range(len(x)):
        of_token = torch.zeros(x.size(1), dtype=x.dtype)
        for place, expert in enumerate(chosen[token].tolist()):
            h = F.silu(gate_proj[expert] @ x[token]) * (up_proj[expert] @ x[token])
            of_token = of_token + gates[token, place] * (down_proj[expert] @ h)
        parts.append(of_token)
    return torch.stack(parts) if parts else x * 0


def experts(x: Tensor, gates: Tensor, chosen: Tensor, weights: list[Tensor], lean: bool) -> Tensor:
    """Return the same by the layer's ops."""
    routes, (gate_proj, up_proj, down_proj) = Routes.of(chosen, EXPERTS), weights
    rows = routes.rows_of(x)
    gate, up = grouped_product(rows, gate_proj, routes.ends), grouped_product(rows, up_proj, routes.ends)
    product = lean_swiglu_product if lean else swiglu_product
    return routes.summed(product(gate, up, down_proj, routes.sorted(gates), routes.ends))


def arguments_of(tokens: int, chosen: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    top_k = 1 if chosen == "one expert" else 3
    picks = {
        "spread": lambda: torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(tokens)]),
        "one expert": lambda: torch.full((tokens, 1), 3),
        "some idle": lambda: torch.tensor([[4, 0, 1]]).repeat(tokens, 1),
    }
    numbers = picks[chosen]() if tokens else torch.zeros(0, top_k, dtype=torch.int64)
    x, gates = torch.randn(tokens, WIDTH, dtype=dtype), torch.rand(tokens, top_k, dtype=dtype)
    weights = [torch.randn(EXPERTS, *shape, dtype=dtype) / 5 for shape in [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]]
    return x, gates, numbers, weights


def learned(fn, x: Tensor, gates: Tensor, chosen: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return the result and all gradients; what comes back is neither alike everywhere nor contiguous."""
    leaves = [one.clone().requires_grad_() for one in (x, gates, *weights)]
    result = fn(leaves[0], leaves[1], chosen, leaves[2:])
    torch.manual_seed(1)
    coming = torch.randn(*reversed(result.shape)).T.to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, coming)]


@pytest.mark.parametrize("lean", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("chosen", ["spread", "one expert", "some idle"])
def test_experts_learn_what_autograd_says(tokens, chosen, lean):
    arguments = arguments_of(tokens, chosen, torch.float32)
    exact = (
        learned(
            plain_experts,
            *(a.double() if a.is_floating_point() else a for a in arguments[:3]),
            [w.double() for w in arguments[3]],
        )
        if tokens
        else None
    )
    found = learned(lambda *a: experts(*a, lean), *arguments)
    if exact is None:  # Nothing comes back: weights learn nothing, and none of it is NaN.
        assert found[0].shape == (0, WIDTH) and all((one == 0).all() for one in found)
        return
    for name, one, other in zip(("result", "x", "gates", "gate", "up", "down"), found, exact, strict=True):
        assert_close(one, other, enlarged=2.0, name=name)
    for gradient, weight in zip(found[3:], arguments[3], strict=True):
        assert gradient.stride() == weight.stride(), "autograd copies what lies otherwise"
    again = learned(lambda *a: experts(*a, lean), *arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_an_idle_expert_learns_zeros_whatever_lay_in_memory():
    for _ in range(20):
        junk = [torch.full((EXPERTS, INNER, WIDTH), torch.nan) for _ in range(8)]
        del junk
        found = learned(lambda *a: experts(*a, True), *arguments_of(8, "some idle", torch.float32))
        assert all((one[[2, 3]] == 0).all() for one in found[3:])


@pytest.mark.parametrize("lead", [(7,), (2, 7)])
def test_a_dense_layer_learns_what_autograd_says(lead):
    torch.manual_seed(0)
    gate, up = (torch.randn(*lead, INNER, requires_grad=True) for _ in range(2))
    weight = torch.randn(WIDTH, INNER, requires_grad=True)
    coming = torch.randn(*lead, WIDTH)
    found = lean_swiglu_product(gate, up, weight)
    plain = F.linear(plain_swiglu(gate, up, None), weight)
    assert torch.equal(found, plain)
    pairs = zip(*(torch.autograd.grad(one, (gate, up, weight), coming) for one in (found, plain)), strict=True)
    for one, other in pairs:
        assert_close(one, other.double())


def test_a_layer_that_is_computed_again_counts_its_tokens_once(tiny_moonlight):
    model, tokens = tiny_moonlight, torch.randint(0, 256, (2, 16))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.clear_expert_load()
        model(tokens).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain, load = gradients(), model.expert_load().clone()
    recompute(model, len(model.blocks))
    again = gradients()
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert torch.equal(model.expert_load(), load)
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    assert mixtures and load.sum() == len(mixtures) * tokens.numel() * mixtures[0].gate.top_k


def test_attention_is_not_computed_again():
    from tests.workers.test_llama import TINY
    from workers.models import build

    model, tokens = build(TINY).train(), torch.randint(0, 256, (2, 16))
    recompute(model, TINY.num_layers)
    calls: Counter[str] = Counter()

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Counts():
        model(tokens).square().sum().backward()
    assert calls["_scaled_dot_product_flash_attention_for_cpu"] == TINY.num_layers
    assert calls["silu"] == 2 * TINY.num_layers, "all else is"


@pytest.fixture
def tiny_moonlight() -> nn.Module:
    from tests.workers.test_moonlight import TINY
    from workers.models import build

    torch.manual_seed(0)
    return build(TINY).train()
