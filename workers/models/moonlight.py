"""Moonlight: DeepSeek-V3's architecture as Moonlight-16B-A3B uses it ("Muon is Scalable for LLM Training").

Multi-head latent attention without query compression, a dense SwiGLU in the first layers, then routed experts with a
sigmoid router, shared experts and a balancing bias instead of an auxiliary loss. Parameter names are Hugging Face's,
except that a layer's experts are stacked `[E, out, in]`.

Every operation is deterministic for a given number of threads; no gradient is summed in a racing order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optim.qk_clip import HeadRows
from workers.config import MoonlightConfig
from workers.models.attention import CausalAttention
from workers.models.cache import KeyValueCache, Mask
from workers.models.feed_forward import Routes, grouped_product, rows_of_each, swiglu_product
from workers.models.language_model import LanguageModel
from workers.models.layers import RMSNorm, SwiGLU, rotary, training_flops
from workers.models.masks import DocumentMask
from workers.models.recompute import recomputing

LATENT_NORM_EPS = 1e-6
"""Of the norm of the compressed keys and values: DeepSeek's code and transformers' have this one whatever
`rms_norm_eps` says, and with small latents (an RMS of 0.006 has a mean square of 3.6e-5) it changes the logits."""


class Moonlight(LanguageModel):
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

    def expert_load(self) -> Tensor:
        """Return what the layers with experts have counted."""
        loads = [experts.load for experts in self._experts()]
        return torch.stack(loads) if loads else torch.zeros(0, self.config.num_experts, dtype=torch.int64)

    def clear_expert_load(self) -> None:
        """Start counting anew."""
        for experts in self._experts():
            experts.load.zero_()

    @torch.no_grad()
    def balance_experts(self, load: Tensor, rate: float | None = None) -> None:
        """Move every router's bias against the load of the global batch.

        `b <- b + u * (sign(e) - mean(sign(e)))`, `e = mean load - load` (Moonlight, appendix C), where u is
        `router_bias_rate`: taking the mean away keeps the biases from drifting together.

        Args:
            load: tokens per expert, `[MoE layers, experts]`, summed over all ranks.
            rate: of a stage, in the place of `router_bias_rate`.
        """
        rate = self.config.router_bias_rate if rate is None else rate
        for experts, tokens in zip(self._experts(), load.double(), strict=True):
            direction = torch.sign(tokens.mean() - tokens)
            bias = experts.gate.e_score_correction_bias
            bias += (rate * (direction - direction.mean())).to(bias)

    def _experts(self) -> list["MixtureOfExperts"]:
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]


class Trunk(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dense=i < config.num_dense_layers) for i in range(config.num_layers))
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

    def __init__(self, config: MoonlightConfig, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Mask | None = None) -> Tensor:
        """Map `[batch, time, hidden]` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, mask) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(normed))


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


class Router(nn.Module):
    """Scores by sigmoid; a bias that no gradient reaches steers the choice, but not the weight, of the experts."""

    e_score_correction_bias: Tensor

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        self.top_k, self.scale = config.num_experts_per_token, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[tokens, hidden]` to gates (fp32) and expert numbers, both `[tokens, top_k]`."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(self.top_k, sorted=False).indices
        gates = scores.gather(1, chosen)
        return self.scale * gates / (gates.sum(-1, keepdim=True) + 1e-20), chosen

    def _apply(self, fn, recurse: bool = True) -> "Router":  # noqa: ANN001
        # A bias step of 1e-3 would be lost in bf16: the buffer follows the device but never the dtype.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias.is_meta:
            return self
        self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self


class Experts(nn.Module):
    """The routed experts' weights, stacked `[E, out, in]`: each slice is a matrix of its own to Muon."""

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        experts, hidden, intermediate = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))

    def forward(self, x: Tensor, gates: Tensor, routes: Routes) -> Tensor:
        """Return the sum of what each token's experts make of it, times their gates.

        Args:
            x: `[tokens, hidden]`.
            gates: of each token's experts, `[tokens, top_k]`, in the dtype of `x`.
            routes: which they are.
        """
        rows = routes.rows_of(x)
        gate = grouped_product(rows, self.gate_proj, routes.ends)
        up = grouped_product(rows, self.up_proj, routes.ends)
        return routes.summed(swiglu_product(gate, up, self.down_proj, routes.sorted(gates), routes.ends))


class MixtureOfExperts(nn.Module):
    """Routed and shared experts; no token is dropped."""

    load: Tensor

    def __init__(self, config: MoonlightConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared) if shared else None
        self.register_buffer("load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Map `[batch, time, hidden]` to the same, and count the experts' load while training."""
        rows = x.flatten(0, -2)
        gates, chosen = self.gate(rows)
        routes = Routes.of(chosen, len(self.load))
        if self.training and not recomputing():
            self.load += self._load_of(chosen, mask) if isinstance(mask, DocumentMask) else routes.counts
        mixed = self.experts(rows, gates.to(x.dtype), routes).view_as(x)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)

    def _load_of(self, chosen: Tensor, mask: DocumentMask) -> Tensor:
        """Return the rows of each expert that are not of what fills sequences up; `chosen` is `[tokens, top_k]`."""
        counts = mask.real.flatten().to(torch.int64)
        return rows_of_each(chosen.flatten(), len(self.load), counts.repeat_interleave(chosen.size(1)))
