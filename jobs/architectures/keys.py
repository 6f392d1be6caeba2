"""The keys of a Hugging Face `config.json`: each is asked for, or known to change no logits."""

import math
from collections.abc import Mapping
from typing import Any

from workers.common.errors import ConfigError

NO_LOGITS = frozenset(
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


class Keys:
    """The keys of a `config.json`, with transformers' values for missing ones; it keeps which ones were asked for."""

    def __init__(self, config: dict[str, Any], defaults: Mapping[str, Any]) -> None:
        self.config = config
        self.values = {**defaults, **config}
        self.known = {*NO_LOGITS, "quantization_config"}

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
            allowed_text = " or ".join(said(one) for one in allowed)
            raise ConfigError(f"config.json: {key} must be {allowed_text}, not {said(value)}{missing}")
        return value

    def size(self, key: str, instead: int | None = None) -> int:
        """Return a whole number; null is `instead`, where that is given."""
        value = self.take(key)
        if value is None and instead is not None:
            return instead
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"config.json: {key} must be a whole number, not {said(value)}")
        return value

    def number(self, key: str) -> float:
        """Return a finite number."""
        return finite(key, self.take(key))


def finite(key: str, value: object) -> float:
    """Return a finite number.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be a number, not {said(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"config.json: {key} must be a finite number, not {said(value)}")
    return number


def said(value: object) -> str:
    """Return a value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
