"""Llama with DeepSeek-V3's experts: what a dense Llama becomes (`raymuon convert`). To transformers it is a GLM-4 MoE.

Attention is Llama's, experts and their router are Moonlight's: a sigmoid router with a balancing bias.
"""

from torch import nn

from workers.config import LlamaMoeConfig
from workers.models.experts import MixtureModel, feed_forward
from workers.models.llama import Llama


class LlamaMoe(MixtureModel, Llama):
    """The causal language model."""

    def __init__(self, config: LlamaMoeConfig) -> None:
        super().__init__(config)
        self.visited = config.num_experts_per_token / config.num_experts

    @property
    def mixture(self) -> LlamaMoeConfig:
        """The settings of its experts."""
        assert isinstance(self.config, LlamaMoeConfig)
        return self.config

    def feed_forward(self, layer: int) -> nn.Module:
        """Make what a layer has after its attention."""
        return feed_forward(self.mixture, layer)
