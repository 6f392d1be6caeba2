"""`raymuon import`: a Hugging Face model as a checkpoint with which a run can begin (`train.init`)."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jobs.folder_model import FolderModel
from orchestrator.log.run_log import RunLog
from orchestrator.record.provenance import code_of
from workers.checkpoint.lineage import descend
from workers.checkpoint.manifest import BUFFER, WEIGHT, TensorSlice, place_of
from workers.checkpoint.shards import write_shard
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store, is_remote, local_path, shared_url, storage_errors
from workers.data.json_tokenizer import write_tokenizer


def import_model(folder: str, to: str, say: Callable[[str], object] = lambda text: None, s3_endpoint: str = "") -> str:
    """Write the model in a local folder as a checkpoint of step 0 at `to`; return its URL.

    `say` gets what to tell a person. `s3_endpoint` is of an S3 store that is not AWS. What an import has written that
    fails, or that somebody ends, is taken away.

    Raises:
        ConfigError: there is no model that we know, a tensor is missing, left over or not finite, or something is at
            `to` already.
        StorageError: it cannot be written, or there is no room for it.
    """
    store = Store(shared_url(to), s3_endpoint)
    if store.names(""):
        raise ConfigError(f"--to {to}: something is there already; name a new folder")
    with FolderModel(Path(folder), say) as model:
        _check_room(store, model.num_bytes)
        with store.whole_or_nothing():
            _write(model, store, say)
    return store.url


def _write(model: FolderModel, store: Store, say: Callable[[str], object]) -> None:
    tensors = {}
    for kind in (WEIGHT, BUFFER):
        for name in model.names(kind):
            whole = model.tensor(kind, name)
            tensors[TensorSlice(kind, name, 0, whole.size)] = whole.ravel()
    if model.described.tied:
        say("the output layer, which was the embedding, becomes one of its own: they may part in training")
    if model.tokenizer is not None:
        write_tokenizer(store, model.tokenizer)
    log = RunLog(store)
    attempt = log.take_over(model.manifest.identity)
    shard = write_shard(store, place_of(0, attempt, 1), 0, tensors)
    lineage = descend(code_of())
    known = {"run_id": log.run_id, "attempt": attempt, "generation": 1, "shards": (shard,), "lineage": lineage}
    log.commit(replace(model.manifest, **known))


def _check_room(store: Store, needed: int) -> None:
    """Refuse what the disk would not hold, before it is full.

    Raises:
        StorageError: it would not.
    """
    if is_remote(store.url):
        return
    place = local_path(store.url)
    with storage_errors(store.url):
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        if (free := shutil.disk_usage(there).free) < needed:
            raise StorageError(
                f"{store.url}: the model takes {needed / 1e9:.1f} GB in float32, and the disk has {free / 1e9:.1f} GB "
                "left; name another place, or make room"
            )
