"""What a Hugging Face `config.json` says, in our terms: sizes, or why the model is none of ours. Without torch.

transformers is the oracle: a missing key has the value that transformers takes, and every key is accounted for. It is a
size of ours, or has to have the one value that we compute with, or is known to change no logits. A key that is none of
these may change the arithmetic in a way that no tensor's shape tells (a window, a scale of the logits): it is refused.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optim.checks import ConfigProblems
from workers.common.errors import ConfigError
from workers.config import LlamaConfig, ModelConfig, MoonlightConfig

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
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
    },
    "deepseek_v3": {
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
    },
}
"""transformers' values of what `config.json` leaves out, by `model_type`."""
ROPE_THETA = 10000.0
"""transformers' base of the rotary positions where none is given."""
_NO_LOGITS = frozenset(
    (
        *("model_type", "auto_map", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
        *("dtype", "torch_dtype", "tokenizer_class", "use_cache", "return_dict", "output_hidden_states"),
        *("output_attentions", "output_router_logits", "id2label", "label2id", "num_labels", "problem_type"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "experts_implementation"),
        *("chunk_size_feed_forward", "pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef"),
        *("num_nextn_predict_layers", "num_mtp_layers", "sep_token_id", "is_llama_config"),
        *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "min_length", "num_beams"),
        *("repetition_penalty", "unsloth_version", "unsloth_fixed", "transformers.js_config"),
    )
)
"""Keys about the file, training, generation or how fast it is. Layers that predict further tokens are tensors, too, and
are refused as these."""


@dataclass(frozen=True)
class Described:
    """A model as its `config.json` describes it."""

    model: ModelConfig
    tied: bool
    """The output layer is the embedding."""
    about: dict[str, Any]
    """What belongs with the model though nothing here computes with it, under Hugging Face's names: how many positions,
    and the ids of special tokens. An export has it again."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.parent}: no {path.name} of a model ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path.parent}: no {path.name} of a model (it is no object but {_said(found)})")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of a key that stands there twice nobody knows which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} stands there twice")
    return found


def describe(config: dict[str, Any]) -> Described:
    """Return our sizes of a model with this `config.json`.

    Raises:
        ConfigError: it is of an architecture, or of a kind of one, that we do not have, or has a key that is not known.
    """
    if (quantized := config.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ConfigError(
            f"config.json: quantization_config (method {_said(method)}): quantized weights are not read; load the "
            "model with transformers, dequantize it there and save it as bfloat16"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ConfigError(f"config.json: model_type must be deepseek_v3 or llama, not {_said(kind)}")
    keys = _Keys(config, DEFAULTS[kind])
    try:
        model = _llama(keys) if kind == "llama" else _moonlight(keys)
    except ConfigProblems as error:
        raise ConfigError(f"config.json: {error}") from error
    tied = keys.one_of("tie_word_embeddings", True, False)
    about = {"max_position_embeddings": keys.size("max_position_embeddings")}
    about |= {key: _ids(key, keys.take(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if (about["pad_token_id"] or 0) >= model.vocab_size:  # transformers looks it up in the embedding.
        raise ConfigError(f"config.json: pad_token_id must be below vocab_size, not {about['pad_token_id']}")
    if unknown := sorted(key for key, value in config.items() if key not in keys.known and value is not None):
        raise ConfigError(
            f"config.json: {', '.join(unknown)}: raymuon does not know whether this changes what the model computes; "
            "where it does not, take it out of config.json"
        )
    return Described(model, tied, about)


class _Keys:
    """The keys of a `config.json`, with transformers' values for missing ones; it keeps which ones were asked for."""

    def __init__(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.config = config
        self.values = {**defaults, **config}
        self.known = {*_NO_LOGITS, "quantization_config"}

    def take(self, key: str) -> Any:
        """Return a value as it is."""
        self.known.add(key)
        return self.values.get(key)

    def one_of(self, key: str, *allowed: Any) -> Any:
        """Return a value that must be one of these; a missing key of no default is the first."""
        self.known.add(key)
        value = self.values.get(key, allowed[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            missing = "" if key in self.config else " (transformers' value where it is missing)"
            allowed_text = " or ".join(_said(one) for one in allowed)
            raise ConfigError(f"config.json: {key} must be {allowed_text}, not {_said(value)}{missing}")
        return value

    def size(self, key: str, instead: int | None = None) -> int:
        """Return a whole number; null is `instead`, where that is given."""
        value = self.take(key)
        if value is None and instead is not None:
            return instead
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"config.json: {key} must be a whole number, not {_said(value)}")
        return value

    def number(self, key: str) -> float:
        """Return a finite number."""
        return _finite(key, self.take(key))


def _common(keys: _Keys, architecture: str) -> dict[str, Any]:
    """Return the sizes that all models have, and hold what none may have another way."""
    keys.one_of("architectures", [architecture], None)
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
        "rope_theta": _theta(keys),
        "init_std": keys.number("initializer_range"),
    }


def _llama(keys: _Keys) -> LlamaConfig:
    common = _common(keys, "LlamaForCausalLM")
    keys.one_of("mlp_bias", False)
    keys.one_of("rope_interleaved", False)
    heads = common["num_heads"]
    return LlamaConfig(
        **common,
        num_kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=keys.size("head_dim", common["hidden_size"] // max(heads, 1)),
    )


def _moonlight(keys: _Keys) -> MoonlightConfig:
    common = _common(keys, "DeepseekV3ForCausalLM")
    keys.one_of("q_lora_rank", None)
    keys.one_of("n_group", 1)
    keys.one_of("topk_group", 1)
    keys.one_of("norm_topk_prob", True)
    keys.one_of("rope_interleave", True)
    keys.one_of("scoring_func", "sigmoid")
    keys.one_of("topk_method", "noaux_tc")
    keys.one_of("moe_layer_freq", 1)
    keys.one_of("num_key_value_heads", common["num_heads"], None)
    nope, rope, experts = keys.size("qk_nope_head_dim"), keys.size("qk_rope_head_dim"), keys.size("n_routed_experts")
    keys.one_of("head_dim", rope)  # transformers turns as many numbers of each head.
    keys.one_of("qk_head_dim", nope + rope)
    keys.one_of("num_local_experts", experts)  # Another name of the same.
    return MoonlightConfig(
        **common,
        kv_lora_rank=keys.size("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=keys.size("v_head_dim"),
        num_dense_layers=min(keys.size("first_k_dense_replace"), common["num_layers"]),
        moe_intermediate_size=keys.size("moe_intermediate_size"),
        num_experts=experts,
        num_experts_per_token=keys.size("num_experts_per_tok"),
        num_shared_experts=keys.size("n_shared_experts"),
        routed_scaling_factor=keys.number("routed_scaling_factor"),
    )


def _theta(keys: _Keys) -> float:
    """Return the base of the rotary positions; it may stand in three places, of which transformers takes one."""
    given = {"rope_theta": keys.config["rope_theta"]} if "rope_theta" in keys.config else {}
    keys.known.add("rope_theta")
    for place in ("rope_parameters", "rope_scaling"):
        inner = keys.take(place)
        if inner is None:
            continue
        if not isinstance(inner, dict):
            raise ConfigError(f"config.json: {place} must be an object, not {_said(inner)}")
        for key, value in inner.items():
            if key in ("rope_type", "type"):
                if value != "default":
                    raise ConfigError(
                        f"config.json: {place}.{key}: scaled rotary positions are not supported ({_said(value)})"
                    )
            elif key == "rope_theta":
                given[f"{place}.rope_theta"] = value
            elif value is not None and (key, value) != ("partial_rotary_factor", 1.0):
                raise ConfigError(f"config.json: {place}.{key} is not known; only rope_type and rope_theta are")
    thetas = {key: _finite(key, value) for key, value in given.items()}
    if len(set(thetas.values())) > 1:
        told = " and ".join(f"{key}={value}" for key, value in thetas.items())
        raise ConfigError(f"config.json: {told} differ; leave the one with which the model was trained")
    return next(iter(thetas.values()), ROPE_THETA)


def _ids(key: str, value: Any) -> Any:
    """Return a special token's id, or none, or several where a text may end in several ways."""
    for one in value if isinstance(value, list) and key == "eos_token_id" else [value]:
        if value is not None and (not isinstance(one, int) or isinstance(one, bool)):
            raise ConfigError(f"config.json: {key} must be a token's number, not {_said(value)}")
    return value


def _finite(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be a number, not {_said(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"config.json: {key} must be a finite number, not {_said(value)}")
    return number


def _said(value: object) -> str:
    """Return a value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
