"""`raymuon import`: a Hugging Face model as a checkpoint with which a run can begin (`train.init`)."""

from collections.abc import Callable
from pathlib import Path

from jobs.first_checkpoint import check_room, new_folder, write_first
from jobs.folder_model import FolderModel
from workers.checkpoint.manifest import BUFFER, WEIGHT


def import_model(folder: str, to: str, say: Callable[[str], object] = lambda text: None, s3_endpoint: str = "") -> str:
    """Write the model in a local folder as a checkpoint of step 0 at `to`; return its URL.

    `say` gets what to tell a person. `s3_endpoint` is of an S3 store that is not AWS. What an import has written that
    fails, or that somebody ends, is taken away.

    Raises:
        ConfigError: there is no model that we know, a tensor is missing, left over or not finite, or something is at
            `to` already.
        StorageError: it cannot be written, or there is no room for it.
    """
    store = new_folder(to, s3_endpoint)
    with FolderModel(Path(folder), say) as model:
        check_room(store, model.num_bytes)
        with store.whole_or_nothing():
            tensors = [
                (kind, name, model.tensor(kind, name)) for kind in (WEIGHT, BUFFER) for name in model.names(kind)
            ]
            if model.described.tied:
                say("the output layer, which was the embedding, becomes one of its own: they may part in training")
            write_first(store, model.manifest, tensors, model.tokenizer)
    return store.url
