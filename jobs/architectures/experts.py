"""What models with DeepSeek-V3's experts share in `config.json`, both ways, and what transformers needs of them."""

from typing import Any

from jobs.architectures.keys import Keys
from optim.checks import Check
from workers.config import MixtureConfig


def read_experts(keys: Keys, num_layers: int) -> dict[str, Any]:
    """Return our settings of the experts, and hold what we compute in one way alone."""
    keys.one_of("n_group", 1)
    keys.one_of("topk_group", 1)
    keys.one_of("norm_topk_prob", True)
    experts = keys.size("n_routed_experts")
    keys.one_of("num_local_experts", experts)  # Another name of the same.
    return {
        "num_dense_layers": min(keys.size("first_k_dense_replace"), num_layers),
        "moe_intermediate_size": keys.size("moe_intermediate_size"),
        "num_experts": experts,
        "num_experts_per_token": keys.size("num_experts_per_tok"),
        "num_shared_experts": keys.size("n_shared_experts"),
        "routed_scaling_factor": keys.number("routed_scaling_factor"),
    }


def written_experts(model: MixtureConfig) -> dict[str, Any]:
    """Return the same under Hugging Face's names."""
    return {
        "moe_intermediate_size": model.moe_intermediate_size,
        "first_k_dense_replace": model.num_dense_layers,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts,
        "num_experts_per_tok": model.num_experts_per_token,
        "routed_scaling_factor": float(model.routed_scaling_factor),
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
    }


def experts_load(model: MixtureConfig) -> Check:
    """Return what transformers' router needs."""
    return model.num_layers == model.num_dense_layers or model.num_experts >= 2, "its num_experts is 2 or more"


def empty_shared_experts(model: MixtureConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors without elements that transformers has where there are no shared experts."""
    if model.num_shared_experts:
        return {}
    shapes = {
        "gate_proj": (0, model.hidden_size),
        "up_proj": (0, model.hidden_size),
        "down_proj": (model.hidden_size, 0),
    }
    return {
        f"model.layers.{layer}.mlp.shared_experts.{name}.weight": shape
        for layer in range(model.num_dense_layers, model.num_layers)
        for name, shape in shapes.items()
    }
