"""A Hugging Face folder as a model of ours, read where it lies.

Every tensor of the folder and every key of its `config.json` is accounted for before the first is read. Who wants a
checkpoint to train from has it imported (`import_.py`).
"""

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.architectures import architecture_of
from jobs.config_json import CONFIG, Described, describe, read_json
from jobs.folder_weights import FolderWeights, open_weights
from jobs.hugging_face import names_of
from workers.checkpoint.manifest import BUFFER, Manifest
from workers.common.errors import ConfigError
from workers.config import ModelConfig
from workers.data.config import DataConfig
from workers.data.tokenizer import Tokenizer
from workers.data.tokenizer_files import JSON, TIKTOKEN, open_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class FolderModel:
    """The model in a local folder; as a checkpoint's reader, it gives whole tensors by their names here, in fp32.

    Its files stay open as long as it is there, or until its `with` ends.

    Args:
        folder: with config.json and *.safetensors.
        say: told what a person should know.

    Raises:
        ConfigError: there is no model that we know, or a tensor is missing or left over.
    """

    def __init__(self, folder: Path, say: Callable[[str], object] = lambda text: None) -> None:
        self.described = describe(read_json(folder / CONFIG))
        about = {**self.described.about, "generation_config": _generation_config(folder, self.described)}
        self._files = ExitStack()
        self._weights = self._files.enter_context(open_weights(folder))
        shapes, self._buffers = _shapes(self.described.model, self._weights)
        self._parts = _account(self._weights, self.described, shapes)
        self.tokenizer = _tokenizer(folder, say)
        identity = {"model": asdict(self.described.model), "imported": folder.resolve().name, "hugging_face": about}
        if self.tokenizer is not None:
            identity["data.tokenizer"] = self.tokenizer.sha256
        counters = {"step": 0, "tokens": 0, "applied_steps": 0}
        self.manifest = Manifest(folder.name, 0, 0, 0, 1, identity, counters, shapes, ())
        """As an import would have it, without its shards."""

    def __enter__(self) -> "FolderModel":
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.close()

    @property
    def num_bytes(self) -> int:
        """Of all tensors, in fp32."""
        return sum(4 * math.prod(shape) for shape in self.manifest.shapes.values())

    def names(self, kind: str) -> list[str]:
        """Return the names of the tensors of a kind."""
        return [name for name in self.manifest.shapes if (name in self._buffers) == (kind == BUFFER)]

    def tensor(self, kind: str, name: str) -> np.ndarray:
        """Return a whole tensor in its shape.

        Raises:
            ConfigError: something in it is not finite.
        """
        stack = [self._weights.read(part) for part in self._parts[name]]
        return np.stack(stack) if _stacked(name) else stack[0]


def _tokenizer(source: Path, say: Callable[[str], object]) -> Tokenizer | None:
    """Return the tokenizer in the folder, if there is one that can be used."""
    if not any((source / name).exists() for name in (JSON, TIKTOKEN)):
        return None
    try:
        return open_tokenizer(DataConfig(tokenizer=str(source)))
    except ConfigError as error:
        say(f"it comes without a tokenizer: {error}")
        return None


def _generation_config(source: Path, described: Described) -> dict[str, object]:
    """Return how the model generates; where the folder does not say, as transformers makes it of `config.json`."""
    path = source / "generation_config.json"
    ids = {key: value for key, value in described.about.items() if key.endswith("_token_id") and value is not None}
    return read_json(path) if path.exists() else ids


def _shapes(model: ModelConfig, weights: FolderWeights) -> tuple[dict[str, list[int]], set[str]]:
    """Return the shapes of all parameters and replicated buffers, and which are buffers."""
    import torch

    from workers.models import build_empty

    for key in ("num_layers", "num_experts"):  # Each has tensors of its own; to name those of 10^12 takes for ever.
        if (count := getattr(model, key, 0)) > len(weights.where):
            raise ConfigError(
                f"{weights.folder}: config.json says {key} {count}, there are {len(weights.where)} tensors"
            )
    try:
        with torch.device("meta"):
            empty = build_empty(model)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ConfigError(f"{weights.folder}: config.json has sizes that no tensor can have ({error})") from error
    parameters = {name for name, _ in empty.named_parameters()}
    shapes = {name: list(tensor.shape) for name, tensor in empty.state_dict().items()}
    return shapes, shapes.keys() - parameters


def _account(weights: FolderWeights, described: Described, shapes: dict[str, list[int]]) -> dict[str, list[str]]:
    """Return the tensors of the folder that make up each of ours, and refuse where one is missing or left over."""
    parts = {name: names_of(name, shape) for name, shape in shapes.items()}
    if described.tied:
        parts[HEAD] = [EMBEDDING]
    elif HEAD not in weights.where:
        raise ConfigError(
            f"{weights.folder}: there is no tensor {HEAD}, and config.json has no tie_word_embeddings: true, with "
            f"which {EMBEDDING} would be it"
        )
    for name, names in parts.items():
        shape = shapes[name][1:] if _stacked(name) else shapes[name]
        for part in names:
            if (found := weights.shape(part)) != shape:
                raise ConfigError(f"{weights.folder}: {part} has shape {found}, config.json says {shape}")
    left = weights.where.keys() - {part for names in parts.values() for part in names}
    if left := sorted(name for name in left if not _said_already(weights, name, described)):
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ConfigError(f"{weights.folder}: the model has no place for {', '.join(left[:3])}{more}")
    return parts


def _stacked(name: str) -> bool:
    return ".experts." in name


def _said_already(weights: FolderWeights, name: str, described: Described) -> bool:
    """Tell whether a tensor says what is known from elsewhere: a shared output layer, rotary frequencies, nothing."""
    if 0 in weights.shape(name):  # Of shared experts, where there are none.
        return True
    if name == HEAD and described.tied:
        if weights.shape(name) == weights.shape(EMBEDDING) and np.array_equal(
            weights.read(name), weights.read(EMBEDDING)
        ):
            return True
        raise ConfigError(
            f"{weights.folder}: {HEAD} is another than {EMBEDDING}, and config.json has tie_word_embeddings: true; "
            "take the wrong one of these away"
        )
    if re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name):
        dim, theta = architecture_of(described.model).rotary(described.model)
        known = theta ** (-np.arange(0, dim, 2) / dim)
        if weights.shape(name) == [dim // 2] and np.allclose(weights.read(name), known, rtol=1e-2, atol=1e-7):
            return True
        raise ConfigError(f"{weights.folder}: {name} is not of config.json's rope_theta, {theta}")
    return False
