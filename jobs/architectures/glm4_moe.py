"""GLM-4 MoE, which with rotary positions in the whole head is a Llama with DeepSeek-V3's experts: our `llama-moe`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jobs.architectures.architecture import Architecture
from jobs.architectures.experts import empty_shared_experts, experts_load, read_experts, written_experts
from jobs.architectures.keys import Keys, said
from jobs.architectures.shared import read_sizes, written_sizes
from optim.checks import Check
from workers.common.errors import ConfigError
from workers.config import LlamaMoeConfig

TURNED = "partial_rotary_factor"
HALF = 0.5
"""transformers' value of it where neither `config.json` nor its `rope_parameters` say: the published GLM-4s have it."""


class Glm4Moe(Architecture):
    """Grouped-query attention without norms of queries and keys, and experts in one group."""

    model_type = "glm4_moe"
    class_name = "Glm4MoeForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }

    def read(self, keys: Keys) -> LlamaMoeConfig:
        """Return our settings."""
        sizes = read_sizes(keys)
        _check_turned(keys)
        keys.one_of("use_qk_norm", False)
        without = sizes["hidden_size"] // max(sizes["num_heads"], 1)
        return LlamaMoeConfig(
            **sizes,
            **read_experts(keys, sizes["num_layers"]),
            num_kv_heads=keys.size("num_key_value_heads"),
            head_dim=keys.size("head_dim")
            if "head_dim" in keys.config
            else without,  # null is no width to transformers.
        )

    def write(self, model: LlamaMoeConfig) -> dict[str, Any]:
        """Return the keys of `config.json`."""
        return {
            **written_sizes(model),
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            TURNED: 1.0,
            "use_qk_norm": False,
            **written_experts(model),
        }

    def loads(self, model: LlamaMoeConfig) -> list[Check]:
        """Return what transformers' router needs."""
        return [experts_load(model)]

    def empty(self, model: LlamaMoeConfig) -> dict[str, tuple[int, ...]]:
        """Return shared experts where there are none."""
        return empty_shared_experts(model)

    def rotary(self, model: LlamaMoeConfig) -> tuple[int, float]:
        """Return that the whole head turns."""
        return model.head_dim, model.rope_theta


def _check_turned(keys: Keys) -> None:
    """Refuse heads of which a part alone turns; what is said in two places is held by `read_sizes`.

    Raises:
        ConfigError: a part does, or nothing is said, which means the half.
    """
    inner = keys.config.get("rope_parameters")
    said_inside = inner.get(TURNED) if isinstance(inner, dict) else None
    turned = keys.config.get(TURNED) if said_inside is None else said_inside
    if turned != 1 or isinstance(turned, bool):
        value = f"{HALF}, transformers' value where it is missing" if turned is None else said(turned)
        raise ConfigError(f"config.json: {TURNED} must be 1.0, not {value}: heads of which a part turns are not known")
