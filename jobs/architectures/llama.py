"""Llama, which is transformers' of the same name."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jobs.architectures.architecture import Architecture
from jobs.architectures.keys import Keys
from jobs.architectures.shared import read_sizes, written_sizes
from optim.checks import Check
from workers.config import LlamaConfig


class Llama(Architecture):
    """Grouped-query attention and a dense SwiGLU."""

    model_type = "llama"
    class_name = "LlamaForCausalLM"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }

    def read(self, keys: Keys) -> LlamaConfig:
        """Return our settings."""
        sizes = read_sizes(keys)
        keys.one_of("mlp_bias", False)
        keys.one_of("rope_interleaved", False)
        heads = sizes["num_heads"]
        return LlamaConfig(
            **sizes,
            num_kv_heads=keys.size("num_key_value_heads", heads),
            head_dim=keys.size("head_dim", sizes["hidden_size"] // max(heads, 1)),
        )

    def write(self, model: LlamaConfig) -> dict[str, Any]:
        """Return the keys of `config.json`."""
        return {
            **written_sizes(model),
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "mlp_bias": False,
        }

    def loads(self, model: LlamaConfig) -> list[Check]:
        """Return what transformers checks in its config."""
        hidden, heads, std = model.hidden_size, model.num_heads, model.init_std
        return [
            (hidden % heads == 0, f"its hidden_size ({hidden}) divides by num_heads ({heads})"),
            (std <= 1, f"its init_std ({std}) is 1 or less (a run from it, train.init, may have another)"),
        ]

    def rotary(self, model: LlamaConfig) -> tuple[int, float]:
        """Return that the whole head turns."""
        return model.head_dim, model.rope_theta
