"""The weights in a folder of safetensors files: each tensor once, where the index says, in a dtype that is a number.

Nothing else is ever read. What cannot be told for sure (a name in two files, a file that the index does not know) is
refused: a stale file beside the right ones would otherwise win, or be trained on without a word.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jobs.config_json import read_json
from workers.common.errors import ConfigError

INDEX = "model.safetensors.index.json"
NUMBERS = {"F64", "F32", "F16", "BF16"}
"""Dtypes, as safetensors calls them, whose elements are the weights; of all others they are codes with scales."""


class FolderWeights:
    """The tensors of a folder, opened."""

    def __init__(self, folder: Path, where: dict[str, Any]) -> None:
        self.folder, self.where = folder, where

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape.

        Raises:
            ConfigError: there is no such tensor, or its elements are no weights.
        """
        if name not in self.where:
            raise ConfigError(f"{self.folder}: there is no tensor {name}")
        about = self.where[name].get_slice(name)
        if (dtype := about.get_dtype()) not in NUMBERS:
            raise ConfigError(
                f"{self.folder}: {name} is of dtype {dtype}; weights must be float16, bfloat16, float32 or float64. "
                "Load the model with transformers, dequantize it there and save it as bfloat16"
            )
        return about.get_shape()

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in fp32.

        Raises:
            ConfigError: something in it is not finite.
        """
        tensor = self.where[name].get_tensor(name).float()
        if not tensor.isfinite().all():
            raise ConfigError(f"{self.folder}: {name} has elements that are NaN or infinite, or too large for float32")
        return tensor.numpy()


@contextmanager
def open_weights(folder: Path) -> Iterator[FolderWeights]:
    """Open all safetensors files of a folder.

    Raises:
        ConfigError: there are none, one is damaged, a name is in two, or the index says something else.
    """
    from safetensors import SafetensorError, safe_open

    if (folder / "adapter_config.json").exists():
        raise ConfigError(f"{folder}: adapter_config.json is there: merge the adapter into its model first")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [path.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5") for path in folder.glob(kind)]
        seen = f"; {', '.join(sorted(others)[:3])} cannot be read, save it as safetensors" if others else ""
        raise ConfigError(f"{folder}: no *.safetensors there; other formats are not read{seen}")
    with ExitStack() as stack:
        where, file_of = {}, {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, "pt"))
                names = opened.keys()
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file}: not a safetensors file ({error})") from error
            if twice := sorted(file_of.keys() & names):
                raise ConfigError(
                    f"{folder}: {twice[0]} is in {file_of[twice[0]]} and in {file.name}; remove the stale file"
                )
            where |= dict.fromkeys(names, opened)
            file_of |= dict.fromkeys(names, file.name)
        _follow_index(folder, file_of)
        yield FolderWeights(folder, where)


def _follow_index(folder: Path, file_of: dict[str, str]) -> None:
    """Refuse a folder in which a tensor is not where the index says."""
    if not (folder / INDEX).exists():
        return
    said = read_json(folder / INDEX).get("weight_map")
    if not isinstance(said, dict):
        raise ConfigError(f"{folder}: {INDEX} has no weight_map")
    for name in sorted(said.keys() | file_of.keys()):
        if said.get(name) != file_of.get(name):
            raise ConfigError(
                f"{folder}: {name} is in {file_of.get(name, 'no file')}, and {INDEX} puts it into "
                f"{said.get(name, 'none')}; remove what is stale"
            )
