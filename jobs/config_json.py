"""What a Hugging Face `config.json` says, in our terms: sizes, or why the model is none of ours. Without torch.

transformers is the oracle: a missing key has the value that transformers takes, and every key is accounted for. It is a
size of ours, or has to have the one value that we compute with, or is known to change no logits. A key that is none of
these may change the arithmetic in a way that no tensor's shape tells (a window, a scale of the logits): it is refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.architectures import ARCHITECTURES
from jobs.architectures.keys import Keys, said
from optim.checks import ConfigProblems
from workers.common.errors import ConfigError
from workers.common.storage import is_remote, local_path
from workers.config import ModelConfig

CONFIG = "config.json"


def model_folder(url: str) -> Path | None:
    """Return the local folder with a Hugging Face model that is meant; None where it is none."""
    folder = None if is_remote(url) else local_path(url)
    return folder if folder is not None and (folder / CONFIG).is_file() else None


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
        raise ConfigError(f"{path.parent}: no {path.name} of a model (it is no object but {said(found)})")
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
            f"config.json: quantization_config (method {said(method)}): quantized weights are not read; load the "
            "model with transformers, dequantize it there and save it as bfloat16"
        )
    kind = config.get("model_type")
    architecture = next((one for one in ARCHITECTURES.values() if one.model_type == kind), None)
    if architecture is None:
        known = " or ".join(one.model_type for one in ARCHITECTURES.values())
        raise ConfigError(f"config.json: model_type must be {known}, not {said(kind)}")
    keys = Keys(config, architecture.defaults)
    keys.one_of("architectures", [architecture.class_name], None)
    try:
        model = architecture.read(keys)
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


def _ids(key: str, value: Any) -> Any:
    """Return a special token's id, or none, or several where a text may end in several ways."""
    for one in value if isinstance(value, list) and key == "eos_token_id" else [value]:
        if value is not None and (not isinstance(one, int) or isinstance(one, bool)):
            raise ConfigError(f"config.json: {key} must be a token's number, not {said(value)}")
    return value
