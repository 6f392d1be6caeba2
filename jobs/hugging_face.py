"""Our models in Hugging Face's terms: names of tensors, `config.json`, and a tokenizer for bytes. Without torch."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from workers.config import LlamaConfig, ModelConfig, MoonlightConfig

END_OF_DOCUMENT = 0
"""The byte that ends a document in a byte-level corpus."""


def tensors_of(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a weight or buffer under Hugging Face's names: a stack of experts is as many tensors.

    Args:
        name: of the parameter or buffer.
        tensor: in its shape.
    """
    experts, _, projection = name.rpartition(".experts.")
    if not experts:
        yield name, tensor
        return
    for number, expert in enumerate(tensor):
        yield f"{experts}.experts.{number}.{projection}.weight", expert


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
