"""The model against the paper's numbers and against plain, slow arithmetic."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from jobs.load import load
from optim.checks import ConfigProblems
from optim.routing import is_matrix
from tests.closeness import EPS, assert_close
from workers.config import MoonlightConfig
from workers.models import build, logits_of
from workers.models.experts import Experts
from workers.models.feed_forward import Routes
from workers.models.layers import rotary
from workers.models.moonlight import Moonlight

pytestmark = pytest.mark.numeric

TINY = MoonlightConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=6,
    num_experts_per_token=2,
    num_shared_experts=1,
    init_std=0.1,
)


def tiny(seed: int = 0, **changes) -> Moonlight:
    torch.manual_seed(seed)
    return build(replace(TINY, **changes))


def test_parameter_counts_of_the_16b_are_the_published_ones():
    with torch.device("meta"):
        model = Moonlight(load("moonlight-16b", []).model)
    numels = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(numels.values()) == 15_960_108_544
    experts = sum(n for name, n in numels.items() if ".experts." in name)
    assert sum(numels.values()) - experts + experts * 6 // 64 == 2_914_774_528
    muon = sum(p.numel() for name, p in model.named_parameters() if is_matrix(name, tuple(p.shape), model.tables()))
    assert muon == 15_288_893_440
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert sum(b.numel() for b in biases) == 1_664


def test_the_gate_scale_makes_the_routed_output_as_large_as_one_expert():
    """2.446 is E[1 / |p|] of renormalized top-6 sigmoids of 64 standard normals (Moonlight, appendix)."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(200_000, 64, generator=random).sigmoid().topk(6).values
    p = scores / scores.sum(-1, keepdim=True)
    assert (1 / p.norm(dim=-1)).mean().item() == pytest.approx(MoonlightConfig().routed_scaling_factor, abs=1e-3)


def test_mixture_of_experts_equals_a_loop_over_tokens():
    layer = tiny().model.layers[1].mlp
    layer.gate.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 6))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    result, load = layer(x), layer.load.sum()
    layer, x = layer.double(), x.double()
    expected = torch.zeros_like(x)
    for b, t in [(b, t) for b in range(2) for t in range(5)]:
        token = x[b, t]
        scores = (layer.gate.weight @ token).sigmoid()
        chosen = (scores + layer.gate.e_score_correction_bias).argsort(descending=True)[:2]
        total = scores[chosen].sum()
        for e in chosen:
            hidden = F.silu(layer.experts.gate_proj[e] @ token) * (layer.experts.up_proj[e] @ token)
            expected[b, t] += 2.446 * scores[e] / total * (layer.experts.down_proj[e] @ hidden)
        expected[b, t] += layer.shared_experts(token)
    assert_close(result, expected)
    assert load == 2 * 5 * 2


def test_attention_equals_the_definition():
    attention = tiny().model.layers[0].self_attn
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    result = attention(x, rotary(7, 8, TINY.rope_theta, x.device))
    attention, x = attention.double(), x.double()

    def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.view_as_complex(vector.reshape(-1, 2).contiguous())
        angles = position * TINY.rope_theta ** (-torch.arange(0, 8, 2).double() / 8)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()

    out = torch.zeros(7, 2, 12, dtype=torch.float64)
    q = attention.q_proj(x)[0].view(7, 2, 16)
    compressed, k_rope = attention.kv_a_proj_with_mqa(x)[0].split([16, 8], -1)
    kv = attention.kv_b_proj(attention.kv_a_layernorm(compressed)).view(7, 2, 20)
    for head in range(2):
        for t in range(7):
            scores = torch.stack(
                [
                    (q[t, head, :8] @ kv[s, head, :8] + turned(q[t, head, 8:], t) @ turned(k_rope[s], s))
                    / math.sqrt(16)
                    for s in range(t + 1)
                ]
            )
            out[t, head] = scores.softmax(0) @ kv[: t + 1, head, 8:]
    assert_close(result[0], attention.o_proj(out.flatten(1)))


def test_nothing_looks_ahead():
    model = tiny().eval()
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 8:] = 0
    (found,), (other,) = logits_of(model, tokens), logits_of(model, changed)
    assert_close(other[:8], found[:8])
    assert ((other - found)[8:].norm(dim=-1) > 0.1 * found[8:].norm(dim=-1)).all()


def test_bias_moves_against_the_load_and_keeps_its_mean():
    model = tiny(router_bias_rate=0.1)
    load = torch.tensor([[10, 0, 2, 2, 2, 2]])
    model.balance_experts(load)
    (bias,) = [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
    signs = torch.tensor([-1.0, 1, 1, 1, 1, 1])  # The mean load is 3.
    assert_close(bias, 0.1 * (signs - signs.mean()))
    assert bias.mean().abs() < 0.1 * EPS
    assert not any("bias" in name for name, _ in model.named_parameters()), "a buffer, not a parameter"


def test_bias_stays_in_fp32_when_the_model_becomes_bf16():
    model = tiny()
    model.balance_experts(torch.tensor([[10, 0, 2, 2, 2, 2]]))
    before = model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"].clone()
    model.bfloat16()
    bias = model.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and torch.equal(bias, before)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_the_load_counts_in_training_only():
    model = tiny()
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    model(tokens)
    assert model.expert_load().shape == (1, 6) and model.expert_load().sum() == 2 * 4 * 2
    model.clear_expert_load()
    model.eval()(tokens)
    assert model.expert_load().sum() == 0


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16), ("meta", torch.bfloat16)]
)
def test_a_config_with_experts_is_accepted_where_their_products_work(device, dtype):
    """The oracle is a training step: what the config lets through, grouped_mm computes, and bf16 takes no other.

    Without data (`meta`) torch makes the checks of its CUDA kernel.
    """

    def works(hidden: int, width: int) -> bool:
        experts = Experts(SimpleNamespace(num_experts=2, hidden_size=hidden, moe_intermediate_size=width)).to(
            device, dtype
        )
        for weight in experts.parameters():
            torch.nn.init.normal_(weight)
        try:
            routes = Routes.of(torch.tensor([[0], [1], [1]], device=device), 2)
            x, gates = (torch.ones(3, wide, dtype=dtype, device=device) for wide in (hidden, 1))
            out = experts(x, gates, routes)
            out.square().sum().backward()
        except RuntimeError:
            return False
        return True

    def accepted(hidden: int, width: int) -> bool:
        try:
            replace(TINY, hidden_size=hidden, moe_intermediate_size=width)
        except ConfigProblems:
            return False
        return True

    widths = (1, 2, 4, 7, 8, 12, 16, 20, 24, 60, 66, 88, 90, 96, 104)
    cases = [(32, width) for width in widths] + [(width, 16) for width in widths]
    assert [case for case in cases if accepted(*case) and not works(*case)] == []
    if dtype == torch.bfloat16:
        assert [case for case in cases if works(*case) and not accepted(*case)] == []


def test_widths_that_experts_cannot_have_are_told_by_name():
    with pytest.raises(ConfigProblems) as raised:
        replace(TINY, hidden_size=36, moe_intermediate_size=90)
    assert [problem.split(" where")[0] for problem in raised.value.problems] == [
        "hidden_size must be a multiple of 8",
        "moe_intermediate_size must be a multiple of 8",
    ]
    dense = replace(TINY, hidden_size=36, moe_intermediate_size=90, num_dense_layers=TINY.num_layers)
    assert build(dense)(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 36), "there are no experts in it"
