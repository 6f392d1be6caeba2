"""A checkpoint of step 0 that no run has trained, to begin with (`train.init`): weights, and no optimizer's state.

It is in a folder of its own, as a run's is: it can be shown, verified, generated with and exported as any other.
"""

import shutil
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from orchestrator.log.run_log import RunLog
from orchestrator.record.provenance import code_of
from workers.checkpoint.lineage import descend
from workers.checkpoint.manifest import Manifest, TensorSlice, place_of
from workers.checkpoint.shards import write_shard
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store, is_remote, local_path, shared_url, storage_errors
from workers.data.json_tokenizer import write_tokenizer
from workers.data.tokenizer import Tokenizer


def new_folder(to: str, s3_endpoint: str) -> Store:
    """Return the store of a folder in which nothing is yet.

    Raises:
        ConfigError: something is.
    """
    store = Store(shared_url(to), s3_endpoint)
    if store.names(""):
        raise ConfigError(f"--to {to}: something is there already; name a new folder")
    return store


def check_room(store: Store, needed: int) -> None:
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


def write_first(
    store: Store,
    about: Manifest,
    tensors: Iterable[tuple[str, str, np.ndarray]],
    tokenizer: Tokenizer | None,
    parent: Manifest | None = None,
    url: str = "",
) -> None:
    """Write it, and commit it.

    Args:
        store: an empty folder.
        about: its identity, counters and shapes; the rest is said here.
        tensors: kind, name and fp32 elements of each.
        tokenizer: that goes with it; None for none.
        parent: the checkpoint that it was made of, if it was one.
        url: of the parent's folder.
    """
    held = {TensorSlice(kind, name, 0, whole.size): whole.ravel() for kind, name, whole in tensors}
    if tokenizer is not None:
        write_tokenizer(store, tokenizer)
    log = RunLog(store)
    attempt = log.take_over(about.identity)
    shard = write_shard(store, place_of(0, attempt, 1), 0, held)
    lineage = descend(code_of(), parent, url)
    known = {"run_id": log.run_id, "attempt": attempt, "generation": 1, "shards": (shard,), "lineage": lineage}
    log.commit(replace(about, **known))
