"""Llama: a dense transformer with grouped-query attention, SwiGLU, RMSNorm and rotary positions.

Parameter names are Hugging Face's.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optim.qk_clip import HeadRows
from workers.config import LlamaConfig, LlamaMoeConfig
from workers.models.attention import CausalAttention
from workers.models.cache import KeyValueCache, Mask
from workers.models.language_model import LanguageModel
from workers.models.layers import Embedding, RMSNorm, SwiGLU, rotary, training_flops
from workers.models.masks import DocumentMask


class Llama(LanguageModel):
    """The causal language model."""

    visited = 1.0
    """Share of a stack of experts that a token visits."""

    def __init__(self, config: LlamaConfig | LlamaMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config, self.feed_forward)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Return the hidden states."""
        return self.model(tokens, cache if documents is None else DocumentMask(documents))

    def feed_forward(self, layer: int) -> nn.Module:
        """Make what a layer has after its attention."""
        return SwiGLU(self.config.hidden_size, self.config.intermediate_size)

    @property
    def head(self) -> Tensor:
        """The output layer's weight, a parameter of its own."""
        return self.lm_head.weight

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers."""
        return list(self.model.layers)

    def matrix_parts(self, split: str) -> dict[str, tuple[int, ...]]:
        """Return rows of each matrix of its own within a parameter, by name, as `optim.split` says."""
        config, parts = self.config, {}
        if split == "heads":
            for number in range(config.num_layers):
                attention = f"model.layers.{number}.self_attn"
                parts[f"{attention}.q_proj.weight"] = (config.head_dim,) * config.num_heads
                parts[f"{attention}.k_proj.weight"] = (config.head_dim,) * config.num_kv_heads
                parts[f"{attention}.v_proj.weight"] = (config.head_dim,) * config.num_kv_heads
        return parts

    def flops_per_token(self, seq_len: int) -> float:
        """Return the operations of all layers and heads."""
        config = self.config
        return training_flops(self, self.visited, config.num_layers * config.num_heads * 2 * config.head_dim, seq_len)

    def head_rows(self) -> list[HeadRows]:
        """Return what QK-Clip may scale: a key that several heads share is left alone."""
        config, rows = self.config, []
        own_keys = config.num_kv_heads == config.num_heads
        projections = ("q_proj", "k_proj") if own_keys else ("q_proj",)
        for head in range(config.num_layers * config.num_heads):
            layer, first = head // config.num_heads, head % config.num_heads * config.head_dim
            for projection in projections:
                name = f"model.layers.{layer}.self_attn.{projection}.weight"
                rows.append(HeadRows(name, first, config.head_dim, head, power=1 / len(projections)))
        return rows


class Trunk(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: LlamaConfig | LlamaMoeConfig, feed_forward: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, feed_forward(i)) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, tokens: Tensor, mask: Mask | None) -> Tensor:
        """Return the hidden states `[batch, time, hidden]`."""
        x = self.embed_tokens(tokens)
        rotation = rotary(tokens.size(1), self.config.head_dim, self.config.rope_theta, tokens.device, mask)
        for layer in self.layers:
            x = layer(x, rotation, mask)
        return self.norm(x)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig | LlamaMoeConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = GroupedQueryAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask | None = None) -> Tensor:
        """Map `[batch, time, hidden]` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x), mask)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + dim / 2) (Hugging Face's layout) of `[batch, heads, time, dim]` by their position."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """Attention in which several query heads share a key and value head."""

    def __init__(self, config: LlamaConfig | LlamaMoeConfig) -> None:
        super().__init__()
        self.dim = config.head_dim
        hidden, queries, keys = config.hidden_size, config.num_heads * self.dim, config.num_kv_heads * self.dim
        self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        self.attend = CausalAttention(config.num_heads)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask | None = None) -> Tensor:
        """Map `[batch, time, hidden]` to the same."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(rotate(q, rotation), rotate(k, rotation), v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))
