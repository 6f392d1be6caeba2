"""The Llama with experts against its parts: Llama's attention, Moonlight's experts."""

from dataclasses import replace

import pytest
import torch

from optim.checks import ConfigProblems
from tests.closeness import assert_close
from workers.config import LlamaMoeConfig
from workers.models import build
from workers.models.experts import MixtureOfExperts
from workers.models.layers import SwiGLU, rotary
from workers.models.llama_moe import LlamaMoe

pytestmark = pytest.mark.numeric

TINY = LlamaMoeConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    num_dense_layers=1,
    moe_intermediate_size=16,
    num_experts=6,
    num_experts_per_token=2,
    num_shared_experts=1,
    routed_scaling_factor=1.5,
    init_std=0.1,
)


def tiny(**changes) -> LlamaMoe:
    torch.manual_seed(0)
    return build(replace(TINY, **changes))


def test_the_first_layers_are_dense_and_the_others_have_experts():
    model = tiny()
    assert isinstance(model.model.layers[0].mlp, SwiGLU) and isinstance(model.model.layers[1].mlp, MixtureOfExperts)
    assert model.expert_load().shape == (1, 6)


def test_a_layer_is_attention_and_what_its_experts_make_of_it():
    """Against sums over each token's experts, one by one, in fp64."""
    model = tiny(num_dense_layers=0, num_layers=1)
    layer, tokens = model.model.layers[0], torch.randint(256, (2, 9))
    seen = []
    layer.post_attention_layernorm.register_forward_hook(lambda _, x, out: seen.append((x[0], out)))
    rotation = rotary(9, TINY.head_dim, TINY.rope_theta, tokens.device)
    result = layer(model.model.embed_tokens(tokens), rotation)
    ((before, x),) = ((one.double() for one in pair) for pair in seen)
    mlp = layer.mlp.double()
    gates, chosen = (x @ mlp.gate.weight.T).sigmoid().topk(2)
    gates = 1.5 * gates / gates.sum(-1, keepdim=True)
    swiglu = lambda gate, up, down: (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T  # noqa: E731
    experts, shared = mlp.experts, mlp.shared_experts
    stacks = zip(experts.gate_proj, experts.up_proj, experts.down_proj, strict=True)
    each = torch.stack([swiglu(*one) for one in stacks], -2)
    routed = (gates.unsqueeze(-1) * each.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, x.size(-1)))).sum(-2)
    expected = before + routed + swiglu(shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    assert_close(result, expected, 1)


def test_flops_count_the_experts_that_a_token_visits():
    """6 N of the active parameters, and causal attention."""
    model = tiny()
    idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) * 4 // 6
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name)
    assert model.flops_per_token(64) == 6 * (matrices - idle) + 6 * 2 * 4 * 2 * 8 * 64 / 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_experts_per_token": 7}, "num_experts_per_token must be at most num_experts (6), not 7"),
        ({"moe_intermediate_size": 12}, "moe_intermediate_size must be a multiple of 8"),
        ({"num_dense_layers": 3}, "num_dense_layers must be between 0 and num_layers (2), not 3"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads (3), not 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, told):
    with pytest.raises(ConfigProblems) as raised:
        replace(TINY, **change)
    assert told in str(raised.value)
