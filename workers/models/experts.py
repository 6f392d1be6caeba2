"""Experts, as DeepSeek-V3 has them: a sigmoid router, routed and shared experts, a balancing bias, no auxiliary loss.

Parameter names are Hugging Face's, except that a layer's experts are stacked `[E, out, in]`.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.config import MixtureConfig
from workers.models.cache import Mask
from workers.models.feed_forward import Routes, grouped_product, rows_of_each, swiglu_product
from workers.models.language_model import LanguageModel
from workers.models.layers import SwiGLU
from workers.models.masks import DocumentMask
from workers.models.recompute import recomputing


class MixtureModel(LanguageModel):
    """A model of which some layers have a `MixtureOfExperts` as `mlp`, and the first may have a dense one."""

    @property
    @abstractmethod
    def mixture(self) -> MixtureConfig:
        """The settings of its experts."""

    def expert_load(self) -> Tensor:
        """Return what the layers with experts have counted."""
        loads = [experts.load for experts in self._experts()]
        return torch.stack(loads) if loads else torch.zeros(0, self.mixture.num_experts, dtype=torch.int64)

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
        rate = self.mixture.router_bias_rate if rate is None else rate
        for experts, tokens in zip(self._experts(), load.double(), strict=True):
            direction = torch.sign(tokens.mean() - tokens)
            bias = experts.gate.e_score_correction_bias
            bias += (rate * (direction - direction.mean())).to(bias)

    def _experts(self) -> list["MixtureOfExperts"]:
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MixtureOfExperts)]


def feed_forward(config: MixtureConfig, layer: int) -> nn.Module:
    """Make what a layer has after its attention: a dense SwiGLU in the first ones, then experts."""
    dense = layer < config.num_dense_layers
    return SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)


class Router(nn.Module):
    """Scores by sigmoid; a bias that no gradient reaches steers the choice, but not the weight, of the experts."""

    e_score_correction_bias: Tensor

    def __init__(self, config: MixtureConfig) -> None:
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

    def __init__(self, config: MixtureConfig) -> None:
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

    def __init__(self, config: MixtureConfig) -> None:
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
