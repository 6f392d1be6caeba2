"""`raymuon import`: a Hugging Face model as a checkpoint with which a run can begin (`train.init`)."""

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from jobs.architectures import architecture_of
from jobs.config_json import Described, describe, read_json
from jobs.folder_weights import FolderWeights, open_weights
from jobs.hugging_face import names_of
from orchestrator.log.run_log import RunLog
from orchestrator.record.provenance import code_of
from workers.checkpoint.lineage import descend
from workers.checkpoint.manifest import BUFFER, WEIGHT, Manifest, TensorSlice, place_of
from workers.checkpoint.shards import write_shard
from workers.common.errors import ConfigError
from workers.common.storage import Store, shared_url
from workers.config import ModelConfig
from workers.data.config import DataConfig
from workers.data.json_tokenizer import write_tokenizer
from workers.data.tokenizer import Tokenizer
from workers.data.tokenizer_files import JSON, TIKTOKEN, open_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def import_model(folder: str, to: str, say: Callable[[str], object] = lambda text: None, s3_endpoint: str = "") -> str:
    """Write the model in a local folder as a checkpoint of step 0 at `to`; return its URL.

    Every tensor of the folder and every key of its `config.json` is accounted for; `say` gets what to tell a person.
    `s3_endpoint` is of an S3 store that is not AWS.

    Raises:
        ConfigError: there is no model that we know, a tensor is missing, left over or not finite, or something is at
            `to` already.
        StorageError: it cannot be written.
    """
    source = Path(folder)
    described = describe(read_json(source / "config.json"))
    about = {**described.about, "generation_config": _generation_config(source, described)}
    store = Store(shared_url(to), s3_endpoint)
    if store.names(""):
        raise ConfigError(f"--to {to}: something is there already; name a new folder")
    with open_weights(source) as weights:
        shapes, buffers = _shapes(described.model, weights)
        parts = _account(weights, described, shapes)
        tensors: dict[TensorSlice, np.ndarray] = {}
        for name in shapes:
            stack = [weights.read(part) for part in parts[name]]
            whole = np.stack(stack) if _stacked(name) else stack[0]
            tensors[TensorSlice(BUFFER if name in buffers else WEIGHT, name, 0, whole.size)] = whole.ravel()
        if described.tied:
            say("the output layer, which was the embedding, becomes one of its own: they may part in training")
        log = RunLog(store)
        identity = {"model": asdict(described.model), "imported": source.resolve().name, "hugging_face": about}
        if (tokenizer := _tokenizer(source, say)) is not None:
            identity["data.tokenizer"] = tokenizer.sha256
            write_tokenizer(store, tokenizer)
        attempt = log.take_over(identity)
        shard = write_shard(store, place_of(0, attempt, 1), 0, tensors)
    counters = {"step": 0, "tokens": 0, "applied_steps": 0}
    lineage = descend(code_of())
    log.commit(Manifest(log.run_id, attempt, 1, 0, 1, identity, counters, shapes, (shard,), lineage))
    return store.url


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
