"""Our models in Hugging Face's terms: names of tensors, `config.json`, what transformers can load. Without torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jobs.byte_tokenizer import END_OF_DOCUMENT
from workers.common.errors import ConfigError
from workers.config import LlamaConfig, ModelConfig, MoonlightConfig


def tensors_of(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a weight or buffer under Hugging Face's names: a stack of experts is as many tensors.

    Args:
        name: of the parameter or buffer.
        tensor: in its shape.
    """
    names = names_of(name, list(tensor.shape))
    yield from zip(names, [tensor] if names == [name] else tensor, strict=True)


def empty_tensors_of(model: ModelConfig) -> dict[str, np.ndarray]:
    """Return what only transformers' model has, since nothing is in it: shared experts where there are none.

    Without them it says that it has drawn weights at random.
    """
    if not isinstance(model, MoonlightConfig) or model.num_shared_experts:
        return {}
    shapes = {
        "gate_proj": (0, model.hidden_size),
        "up_proj": (0, model.hidden_size),
        "down_proj": (model.hidden_size, 0),
    }
    return {
        f"model.layers.{layer}.mlp.shared_experts.{name}.weight": np.zeros(shape, np.float32)
        for layer in range(model.num_dense_layers, model.num_layers)
        for name, shape in shapes.items()
    }


def names_of(name: str, shape: list[int]) -> list[str]:
    """Return Hugging Face's names of a weight or buffer of ours; of a stack of experts, one for each."""
    experts, _, projection = name.rpartition(".experts.")
    if not experts:
        return [name]
    return [f"{experts}.experts.{number}.{projection}.weight" for number in range(shape[0])]


def config_of(model: ModelConfig, about: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return `config.json`.

    Args:
        model: sizes.
        about: positions and ids of special tokens, under Hugging Face's names.
        dtype: of the exported weights, as torch calls it.
    """
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "rms_norm_eps": float(model.norm_eps),  # transformers takes no whole number for these.
        "rope_theta": float(model.rope_theta),
        "initializer_range": float(model.init_std),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
        **about,
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
                "routed_scaling_factor": float(model.routed_scaling_factor),
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


def refuse_unloadable(model: ModelConfig) -> None:
    """Refuse sizes with which raymuon trains and that transformers cannot load or run.

    Raises:
        ConfigError: it says what is in the way.
    """
    heads = model.num_heads
    match model:
        case LlamaConfig():
            checks = (
                (
                    model.hidden_size % heads == 0,
                    f"its hidden_size ({model.hidden_size}) divides by num_heads ({heads})",
                ),
                (
                    model.init_std <= 1,
                    f"its init_std ({model.init_std}) is 1 or less (a run from it, train.init, may have another)",
                ),
            )
        case MoonlightConfig():
            experts = model.num_layers > model.num_dense_layers
            checks = ((not experts or model.num_experts >= 2, "its num_experts is 2 or more"),)
    if problems := [text for holds, text in checks if not holds]:
        raise ConfigError(f"transformers loads a {model.name} only where {' and '.join(problems)}")


def trained_on_bytes(seq_len: int) -> dict[str, Any]:
    """Return what `config.json` and `generation_config.json` say of a model that was trained here."""
    ids = {"bos_token_id": END_OF_DOCUMENT, "eos_token_id": END_OF_DOCUMENT}
    generation = {**ids, "do_sample": True, "temperature": 0.7}
    return {"max_position_embeddings": seq_len, **ids, "generation_config": generation}
