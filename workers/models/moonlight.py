"""Moonlight: DeepSeek-V3's architecture as Moonlight-16B-A3B uses it ("Muon is Scalable for LLM Training").

Multi-head latent attention without query compression, a dense SwiGLU in the first layers, then experts (`experts.py`).

Every operation is deterministic for a given number of threads; no gradient is summed in a racing order.
"""

import torch
from torch import Tensor, nn

from optim.qk_clip import HeadRows
from workers.config import MoonlightConfig
from workers.models.attention import CausalAttention
from workers.models.cache import KeyValueCache, Mask
from workers.models.experts import MixtureModel, feed_forward
from workers.models.layers import Embedding, RMSNorm, rotary, training_flops
from workers.models.masks import DocumentMask

LATENT_NORM_EPS = 1e-6
"""Of the norm of the compressed keys and values: DeepSeek's code and transformers' have this one whatever
`rms_norm_eps` says, and with small latents (an RMS of 0.006 has a mean square of 3.6e-5) it changes the logits."""


class Moonlight(MixtureModel):
    """The causal language model."""

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Return the hidden states."""
        return self.model(tokens, cache if documents is None else DocumentMask(documents))

    @property
    def mixture(self) -> MoonlightConfig:
        """The settings of its experts."""
        return self.config

    @property
    def head(self) -> Tensor:
        """The output layer's weight, a parameter of its own."""
        return self.lm_head.weight

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers."""
        return list(self.model.layers)

    def matrix_parts(self, split: str) -> dict[str, tuple[int, ...]]:
        """Return rows of each matrix of its own within a parameter, by name, as `optim.split` says.

        The projection down to keys and values is fused with the one to the shared rotary key; those up to the heads
        hold each head's keys and values one after the other.
        """
        config, parts = self.config, {}
        for number in range(config.num_layers if split != "none" else 0):
            attention = f"model.layers.{number}.self_attn"
            parts[f"{attention}.kv_a_proj_with_mqa.weight"] = (config.kv_lora_rank, config.qk_rope_head_dim)
            if split == "heads":
                query = config.qk_nope_head_dim + config.qk_rope_head_dim
                parts[f"{attention}.q_proj.weight"] = (query,) * config.num_heads
                parts[f"{attention}.kv_b_proj.weight"] = (config.qk_nope_head_dim, config.v_head_dim) * config.num_heads
        return parts

    def flops_per_token(self, seq_len: int) -> float:
        """Return the operations of all layers and heads."""
        config = self.config
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        visited = config.num_experts_per_token / config.num_experts
        return training_flops(self, visited, config.num_layers * config.num_heads * widths, seq_len)

    def head_rows(self) -> list[HeadRows]:
        """Return what QK-Clip may scale: the rotary key, which all heads share, is left alone."""
        config, rows = self.config, []
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        for head in range(config.num_layers * config.num_heads):
            layer, place = divmod(head, config.num_heads)
            attention = f"model.layers.{layer}.self_attn"
            query, up = place * (nope + rope), place * (nope + config.v_head_dim)
            rows += [
                HeadRows(f"{attention}.q_proj.weight", query, nope, head, power=1 / 2),
                HeadRows(f"{attention}.q_proj.weight", query + nope, rope, head, power=1),
                HeadRows(f"{attention}.kv_b_proj.weight", up, nope, head, power=1 / 2),
            ]
        return rows


class Trunk(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, tokens: Tensor, mask: Mask | None) -> Tensor:
        """Return the hidden states `[batch, time, hidden]`."""
        x = self.embed_tokens(tokens)
        rotation = rotary(tokens.size(1), self.config.qk_rope_head_dim, self.config.rope_theta, tokens.device, mask)
        for layer in self.layers:
            x = layer(x, rotation, mask)
        return self.norm(x)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: MoonlightConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = feed_forward(config, number)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask | None = None) -> Tensor:
        """Map `[batch, time, hidden]` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x), mask)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate neighbouring pairs (DeepSeek's interleaved layout) of `[batch, heads, time, dim]` by their position."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values come out of one narrow compression per token."""

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        self.heads, self.rank = config.num_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        self.attend = CausalAttention(self.heads)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask | None = None) -> Tensor:
        """Map `[batch, time, hidden]` to the same; the rotary key is shared by all heads."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        compressed, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        latents = self.kv_a_layernorm(compressed)
        if isinstance(mask, KeyValueCache):
            (kept,) = mask.extend(self, torch.cat((latents.unsqueeze(1), rotate(k_rope.unsqueeze(1), rotation)), -1))
            if not mask.first:
                return self._by_latents(q_nope, rotate(q_rope, rotation), kept, mask)
            mask = None
        kv = self.kv_b_proj(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), rotation).expand(-1, self.heads, -1, -1)
        out = self.attend(torch.cat((q_nope, rotate(q_rope, rotation)), -1), torch.cat((k_nope, k_rope), -1), v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _by_latents(self, q_nope: Tensor, q_rope: Tensor, kept: Tensor, cache: KeyValueCache) -> Tensor:
        """Attend to latents alone: what would make a head's keys and values of them goes to its queries and its output.

        `q . (W_k c) = (W_k^T q) . c`, and `sum(w W_v c) = W_v sum(w c)` (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

        Args:
            q_nope: `[batch, heads, time, nope]`.
            q_rope: `[batch, heads, time, rope]`, rotated.
            kept: latents and rotary keys, `[batch, 1, end, rank + rope]`; as values the latter are left out behind.
            cache: that they are in.
        """
        up_k, up_v = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split([self.nope, self.value], dim=1)
        queries = torch.cat((torch.matmul(q_nope, up_k), q_rope), -1)
        seen = cache.attend_to(queries, kept, kept, (self.nope + self.rope) ** -0.5)[..., : self.rank]
        return self.o_proj(torch.matmul(seen, up_v.mT).transpose(1, 2).flatten(2))
