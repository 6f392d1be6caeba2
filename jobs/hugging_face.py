"""Our models in Hugging Face's terms: names of tensors, `config.json`, what transformers can load. Without torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jobs.architectures import architecture_of
from workers.common.errors import ConfigError
from workers.config import ModelConfig
from workers.data.tokenizer import Tokenizer


def tensors_of(name: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a weight or buffer under Hugging Face's names: a stack of experts is as many tensors.

    Args:
        name: of the parameter or buffer.
        tensor: in its shape.
    """
    names = names_of(name, list(tensor.shape))
    yield from zip(names, [tensor] if names == [name] else tensor, strict=True)


def empty_tensors_of(model: ModelConfig) -> dict[str, np.ndarray]:
    """Return what only transformers' model has, since nothing is in it.

    Without them it says that it has drawn weights at random.
    """
    return {name: np.zeros(shape, np.float32) for name, shape in architecture_of(model).empty(model).items()}


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
    architecture = architecture_of(model)
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **architecture.write(model),
        "use_cache": True,
        "torch_dtype": dtype,
        **about,
    }


def refuse_unloadable(model: ModelConfig) -> None:
    """Refuse a model that transformers does not have, and sizes that it cannot load or run.

    Raises:
        ConfigError: it says what is in the way.
    """
    if problems := [text for holds, text in architecture_of(model).loads(model) if not holds]:
        raise ConfigError(f"transformers loads a {model.name} only where {' and '.join(problems)}")


def trained_with(tokenizer: Tokenizer, seq_len: int) -> dict[str, Any]:
    """Return what `config.json` and `generation_config.json` say of a model that was trained here."""
    begin = tokenizer.end if tokenizer.begin is None else tokenizer.begin
    ids = {"bos_token_id": begin, "eos_token_id": tokenizer.end}
    generation = {**ids, "do_sample": True, "temperature": 0.7}
    return {"max_position_embeddings": seq_len, **ids, "generation_config": generation}
