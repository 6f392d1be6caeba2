"""`raymuon import`: a Hugging Face model as a checkpoint with which a run can begin (`train.init`)."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from jobs.hugging_face import model_of_config, names_of
from orchestrator.run_log import RunLog
from workers.checkpoint.manifest import BUFFER, WEIGHT, Entry, Manifest, place_of
from workers.checkpoint.shards import write_shard
from workers.config import ModelConfig
from workers.errors import ConfigError
from workers.storage import Store, absolute_url


def import_model(folder: str, to: str) -> str:
    """Write the model in a local folder as a checkpoint of step 0 at `to`; return its URL.

    Raises:
        ConfigError: there is no model that we know, it lacks a tensor, or something is at `to` already.
        StorageError: it cannot be written.
    """
    source = Path(folder)
    try:
        config = json.loads((source / "config.json").read_text())
        model = model_of_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: no config.json of a model ({type(error).__name__}: {error})") from error
    store = Store(absolute_url(to.rstrip("/")))
    if store.names(""):
        raise ConfigError(f"--to {to}: something is there already; name a new folder")
    shapes, buffers = _shapes(model)
    with _tensors(source) as read:
        tensors: dict[Entry, np.ndarray] = {}
        for name, shape in shapes.items():
            parts = [read(part) for part in names_of(name, shape)]
            whole = np.stack(parts) if len(parts) > 1 or len(shape) > parts[0].ndim else parts[0]
            if list(whole.shape) != shape:
                raise ConfigError(f"{folder}: {name} has shape {list(whole.shape)}, config.json says {shape}")
            tensors[Entry(BUFFER if name in buffers else WEIGHT, name, 0, whole.size)] = whole.ravel()
        log = RunLog(store)
        identity = {"model": asdict(model), "imported": source.resolve().name}
        attempt = log.take_over(identity)
        shard = write_shard(store, place_of(0, attempt, 1), 0, tensors)
    counters = {"step": 0, "tokens": 0, "applied_steps": 0}
    log.commit(Manifest(log.run_id, attempt, 1, 0, 1, identity, counters, shapes, (shard,)))
    return store.url


def _shapes(model: ModelConfig) -> tuple[dict[str, list[int]], set[str]]:
    """Return the shapes of all parameters and replicated buffers, and which are buffers."""
    import torch

    from workers.models import build_empty

    with torch.device("meta"):
        empty = build_empty(model)
    parameters = {name for name, _ in empty.named_parameters()}
    shapes = {name: list(tensor.shape) for name, tensor in empty.state_dict().items()}
    return shapes, shapes.keys() - parameters


@contextmanager
def _tensors(folder: Path) -> Iterator[Callable[[str], np.ndarray]]:
    """Open all safetensors files; yield what returns a tensor in fp32 by its name. Nothing else is ever read."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: no *.safetensors there; other formats are not read")
    with ExitStack() as stack:
        where = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, "pt"))
            except SafetensorError as error:
                raise ConfigError(f"{file}: not a safetensors file ({error})") from error
            where |= dict.fromkeys(opened.keys(), opened)

        def read(name: str) -> np.ndarray:
            # A model that shares its output layer with its embedding stores it once.
            found = name if name in where else name.replace("lm_head.weight", "model.embed_tokens.weight")
            if found not in where:
                raise ConfigError(f"{folder}: there is no tensor {name}")
            return where[found].get_tensor(found).float().numpy()

        yield read
