"""DeepSeek-V3, whose architecture Moonlight has."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jobs.architectures.architecture import Architecture
from jobs.architectures.experts import empty_shared_experts, experts_load, read_experts, written_experts
from jobs.architectures.keys import Keys
from jobs.architectures.shared import read_sizes, written_sizes
from optim.checks import Check
from workers.config import MoonlightConfig


class DeepseekV3(Architecture):
    """Multi-head latent attention without query compression, and experts in one group."""

    model_type = "deepseek_v3"
    class_name = "DeepseekV3ForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "rope_interleave": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }

    def read(self, keys: Keys) -> MoonlightConfig:
        """Return our settings."""
        sizes = read_sizes(keys)
        keys.one_of("q_lora_rank", None)
        keys.one_of("rope_interleave", True)
        keys.one_of("scoring_func", "sigmoid")
        keys.one_of("topk_method", "noaux_tc")
        keys.one_of("moe_layer_freq", 1)
        keys.one_of("num_key_value_heads", sizes["num_heads"], None)
        nope, rope = keys.size("qk_nope_head_dim"), keys.size("qk_rope_head_dim")
        keys.one_of("head_dim", rope)  # transformers turns as many numbers of each head.
        keys.one_of("qk_head_dim", nope + rope)
        return MoonlightConfig(
            **sizes,
            **read_experts(keys, sizes["num_layers"]),
            kv_lora_rank=keys.size("kv_lora_rank"),
            qk_nope_head_dim=nope,
            qk_rope_head_dim=rope,
            v_head_dim=keys.size("v_head_dim"),
        )

    def write(self, model: MoonlightConfig) -> dict[str, Any]:
        """Return the keys of `config.json`."""
        return {
            **written_sizes(model),
            "num_key_value_heads": model.num_heads,
            "q_lora_rank": None,
            "kv_lora_rank": model.kv_lora_rank,
            "qk_nope_head_dim": model.qk_nope_head_dim,
            "qk_rope_head_dim": model.qk_rope_head_dim,
            "v_head_dim": model.v_head_dim,
            "rope_interleave": True,
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            **written_experts(model),
        }

    def loads(self, model: MoonlightConfig) -> list[Check]:
        """Return what transformers' router needs."""
        return [experts_load(model)]

    def empty(self, model: MoonlightConfig) -> dict[str, tuple[int, ...]]:
        """Return shared experts where there are none."""
        return empty_shared_experts(model)

    def rotary(self, model: MoonlightConfig) -> tuple[int, float]:
        """Return that a part of each head turns."""
        return model.qk_rope_head_dim, model.rope_theta
