"""The Llama with experts against its parts: Llama's attention, Moonlight's experts."""

from dataclasses import replace

import pytest
import torch

from optim.checks import ConfigProblems
from tests.closeness import assert_close
from workers.config import LlamaMoeConfig
from workers.models import build, logits_of
from workers.models.experts import MixtureOfExperts
from workers.models.layers import SwiGLU
from workers.models.llama_moe import LlamaMoe

pytestmark = pytest.mark.numeric

TINY = LlamaMoeConfig(
    hidden_size=32,
    num_layers=3,
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
