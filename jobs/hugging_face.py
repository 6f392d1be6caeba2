"""Our models in Hugging Face's terms: names of tensors, `config.json`, and a tokenizer for bytes. Without torch."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from workers.config import LlamaConfig, ModelConfig, MoonlightConfig
from workers.errors import ConfigError

END_OF_DOCUMENT = 0
"""The byte that ends a document in a byte-level corpus."""


def tensors_of(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a weight or buffer under Hugging Face's names: a stack of experts is as many tensors.

    Args:
        name: of the parameter or buffer.
        tensor: in its shape.
    """
    names = names_of(name, list(tensor.shape))
    yield from zip(names, [tensor] if names == [name] else tensor, strict=True)


def names_of(name: str, shape: list[int]) -> list[str]:
    """Return Hugging Face's names of a weight or buffer of ours; of a stack of experts, one for each."""
    experts, _, projection = name.rpartition(".experts.")
    if not experts:
        return [name]
    return [f"{experts}.experts.{number}.{projection}.weight" for number in range(shape[0])]


def config_of(model: ModelConfig, seq_len: int, dtype: str) -> dict[str, Any]:
    """Return `config.json`.

    Args:
        model: sizes.
        seq_len: tokens per sequence in training.
        dtype: of the exported weights, as torch calls it.
    """
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": seq_len,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": END_OF_DOCUMENT,
        "eos_token_id": END_OF_DOCUMENT,
        "torch_dtype": dtype,
    }
    match model:
        case MoonlightConfig():
            return {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "deepseek_v3",
                **common,
                "num_key_value_heads": model.num_heads,
                "q_lora_rank": None,
                "kv_lora_rank": model.kv_lora_rank,
                "qk_nope_head_dim": model.qk_nope_head_dim,
                "qk_rope_head_dim": model.qk_rope_head_dim,
                "v_head_dim": model.v_head_dim,
                "rope_interleave": True,
                "moe_intermediate_size": model.moe_intermediate_size,
                "first_k_dense_replace": model.num_dense_layers,
                "moe_layer_freq": 1,
                "n_routed_experts": model.num_experts,
                "n_shared_experts": model.num_shared_experts,
                "num_experts_per_tok": model.num_experts_per_token,
                "routed_scaling_factor": model.routed_scaling_factor,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "norm_topk_prob": True,
                "n_group": 1,
                "topk_group": 1,
            }
        case LlamaConfig():
            return {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                **common,
                "num_key_value_heads": model.num_kv_heads,
                "head_dim": model.head_dim,
                "mlp_bias": False,
            }


def model_of_config(config: dict[str, Any]) -> ModelConfig:
    """Return our sizes of a model with this `config.json`.

    Raises:
        ConfigError: it is of an architecture, or of a kind of one, that we do not have.
    """
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or {}
    common = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta"),
        "init_std": config.get("initializer_range", 0.02),
    }
    _require(config, "hidden_act", "silu")
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ConfigError("config.json: scaled rotary positions are not supported")
    if kind == "llama":
        _require(config, "attention_bias", False)
        _require(config, "mlp_bias", False)
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return LlamaConfig(**common, num_kv_heads=kv_heads, head_dim=head_dim)
    if kind == "deepseek_v3":
        for key, value in (
            ("q_lora_rank", None),
            ("n_group", 1),
            ("topk_group", 1),
            ("norm_topk_prob", True),
            ("rope_interleave", True),
            ("attention_bias", False),
        ):
            _require(config, key, value)
        return MoonlightConfig(
            **common,
            kv_lora_rank=config["kv_lora_rank"],
            qk_nope_head_dim=config["qk_nope_head_dim"],
            qk_rope_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
            num_dense_layers=config["first_k_dense_replace"],
            moe_intermediate_size=config["moe_intermediate_size"],
            num_experts=config["n_routed_experts"],
            num_experts_per_token=config["num_experts_per_tok"],
            num_shared_experts=config["n_shared_experts"],
            routed_scaling_factor=config["routed_scaling_factor"],
        )
    raise ConfigError(f"config.json: model_type must be deepseek_v3 or llama, not {kind!r}")


def _require(config: dict[str, Any], key: str, value: object) -> None:
    if config.get(key, value) != value:
        raise ConfigError(f"config.json: {key} must be {value!r}, not {config[key]!r}")


def generation_config() -> dict[str, Any]:
    """Return `generation_config.json`."""
    return {"bos_token_id": END_OF_DOCUMENT, "eos_token_id": END_OF_DOCUMENT, "do_sample": True, "temperature": 0.7}


def byte_tokenizer() -> dict[str, str]:
    """Return the files of a tokenizer whose tokens are bytes, with their content."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = _characters()
    tokenizer = Tokenizer(models.BPE(vocab={character: byte for byte, character in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": characters[END_OF_DOCUMENT],
        "bos_token": characters[END_OF_DOCUMENT],
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(about, indent=2)}


def _characters() -> list[str]:
    """Return the printable character by which byte-level tokenizers write each byte (GPT-2's convention)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
