"""The dense model against plain, slow arithmetic."""

import math
from dataclasses import replace

import pytest
import torch

from optim.checks import ConfigProblems
from optim.routing import is_matrix
from tests.closeness import assert_close
from workers.config import LlamaConfig
from workers.models import build, logits_of
from workers.models.layers import rotary
from workers.models.llama import Llama

pytestmark = pytest.mark.numeric

TINY = LlamaConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    init_std=0.1,
)

LLAMA_3_2_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_size=8192,
)


def tiny() -> Llama:
    torch.manual_seed(0)
    return build(TINY)


def test_parameter_counts_are_those_of_llama_3_2_1b():
    """Published: 1.23 billion with the embedding, which that model shares with its head, counted once."""
    with torch.device("meta"):
        model = Llama(LLAMA_3_2_1B)
    numels = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(numels.values()) - numels["lm_head.weight"] == 1_235_814_400
    muon = sum(p.numel() for name, p in model.named_parameters() if is_matrix(name, tuple(p.shape), model.tables()))
    assert muon == 16 * (2048 * 2048 * 2 + 2048 * 512 * 2 + 3 * 2048 * 8192)


def test_attention_equals_the_definition():
    attention = tiny().model.layers[0].self_attn
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    result = attention(x, rotary(7, 8, TINY.rope_theta, x.device))
    attention, x = attention.double(), x.double()

    def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.complex(vector[:4], vector[4:])
        angles = position * TINY.rope_theta ** (-torch.arange(0, 8, 2).double() / 8)
        out = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((out.real, out.imag))

    out = torch.zeros(7, 4, 8, dtype=torch.float64)
    q = attention.q_proj(x)[0].view(7, 4, 8)
    k, v = attention.k_proj(x)[0].view(7, 2, 8), attention.v_proj(x)[0].view(7, 2, 8)
    for head in range(4):
        shared = head // 2
        for t in range(7):
            scores = torch.stack([turned(q[t, head], t) @ turned(k[s, shared], s) / math.sqrt(8) for s in range(t + 1)])
            out[t, head] = scores.softmax(0) @ v[: t + 1, shared]
    assert_close(result[0], attention.o_proj(out.flatten(1)))


def test_nothing_looks_ahead():
    model = tiny().eval()
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 8:] = 0
    (found,), (other,) = logits_of(model, tokens), logits_of(model, changed)
    assert_close(other[:8], found[:8])
    assert ((other - found)[8:].norm(dim=-1) > 0.1 * found[8:].norm(dim=-1)).all()


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigProblems, match=r"num_heads must be a multiple of num_kv_heads \(3\), not 4"):
        replace(TINY, num_kv_heads=3)
