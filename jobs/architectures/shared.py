"""What models of Llama's kind share in `config.json`: rotary positions, RMSNorm, SwiGLU, no biases; both ways."""

from typing import Any

from jobs.architectures.keys import Keys, finite, said
from workers.common.errors import ConfigError
from workers.config import LlamaConfig, MixtureConfig

ROPE_THETA = 10000.0
"""transformers' base of the rotary positions where none is given."""


def read_sizes(keys: Keys) -> dict[str, Any]:
    """Return the sizes that all models have, and hold what none may have another way."""
    keys.one_of("hidden_act", "silu")
    keys.one_of("attention_bias", False)
    keys.one_of("attention_dropout", 0.0)
    keys.one_of("is_encoder_decoder", False)
    keys.one_of("partial_rotary_factor", 1.0, None)
    return {
        "vocab_size": keys.size("vocab_size"),
        "hidden_size": keys.size("hidden_size"),
        "num_layers": keys.size("num_hidden_layers"),
        "num_heads": keys.size("num_attention_heads"),
        "intermediate_size": keys.size("intermediate_size"),
        "norm_eps": keys.number("rms_norm_eps"),
        "rope_theta": theta(keys),
        "init_std": keys.number("initializer_range"),
    }


def written_sizes(model: LlamaConfig | MixtureConfig) -> dict[str, Any]:
    """Return the same under Hugging Face's names."""
    return {
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
    }


def theta(keys: Keys) -> float:
    """Return the base of the rotary positions; it may stand in three places, of which transformers takes one."""
    given = {"rope_theta": keys.config["rope_theta"]} if "rope_theta" in keys.config else {}
    keys.known.add("rope_theta")
    for place in ("rope_parameters", "rope_scaling"):
        inner = keys.take(place)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            raise ConfigError(f"config.json: {place} must be an object, not {said(inner)}")
        for key, value in inner.items():
            if key in ("rope_type", "type"):
                if value != "default":
                    raise ConfigError(
                        f"config.json: {place}.{key}: scaled rotary positions are not supported ({said(value)})"
                    )
            elif key == "rope_theta":
                given[f"{place}.rope_theta"] = value
            elif value is not None and (key, value) != ("partial_rotary_factor", 1.0):
                raise ConfigError(f"config.json: {place}.{key} is not known; only rope_type and rope_theta are")
    thetas = {key: finite(key, value) for key, value in given.items()}
    if len(set(thetas.values())) > 1:
        told = " and ".join(f"{key}={value}" for key, value in thetas.items())
        raise ConfigError(f"config.json: {told} differ; leave the one with which the model was trained")
    return next(iter(thetas.values()), ROPE_THETA)
