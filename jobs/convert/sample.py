"""A sample of text, what a dense model's layers get of it, and the loss of a model on it."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from fsspec import AbstractFileSystem

from workers.common.errors import ConfigError
from workers.data.documents import documents, pieces_of
from workers.data.files import files_of
from workers.data.tokenizer import Tokenizer
from workers.models.language_model import LanguageModel
from workers.objective import batch_of, summed_loss

TOKENS = 16_384
"""Of each half of a sample: by the first the experts are made, on the second the losses are measured."""
LONGEST = 2_048
"""Tokens of a sequence at most: an imported model has as many as it has positions, and few documents are so long."""
OF_DOCUMENT = 4
"""Sequences of a document at most, so that many of them are seen."""
BATCH_TOKENS = 4_096
"""That go through a model at once."""


def read_sample(text: str, tokenizer: Tokenizer, seq_len: int, seed: int, s3_endpoint: str) -> np.ndarray:
    """Return sequences of a text, of its files in an order by the seed: int64 `[sequences, seq_len + 1]`.

    Args:
        text: files, folders and globs, as `data.source` has them.
        tokenizer: of the model.
        seq_len: tokens of a sequence that the model looks at.
        seed: of the order.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: there is no text, or too little: two sequences are the least.
        StorageError: it cannot be read.
    """
    files = list(files_of(text, (), s3_endpoint))
    wanted, found = max(2, 2 * TOKENS // seq_len), list[np.ndarray]()
    for number in np.random.default_rng(seed).permutation(len(files)):
        for document in _documents(files[number], s3_endpoint):
            ids = tokenizer.encode([document])[0].astype(np.int64)
            found += _spread(ids, seq_len + 1)
            if len(found) >= wanted:
                return np.stack(found[:wanted])
    if len(found) < 2:
        raise ConfigError(
            f"--text {text}: its documents have {len(found)} stretches of {seq_len + 1} tokens, and 2 are the least: "
            "one to convert by, one to measure on; name more text"
        )
    return np.stack(found)


def _documents(file: tuple[AbstractFileSystem, str], s3_endpoint: str) -> Iterator[bytes]:
    for piece in pieces_of(*file, "auto", s3_endpoint):
        yield from (document.text for document in documents(piece, "text", _refuse))


def _refuse(told: str) -> None:
    raise ConfigError(f"--text: {told}; mend or leave out the file")


def _spread(ids: np.ndarray, length: int) -> list[np.ndarray]:
    """Return a few stretches of a document, evenly spread over it."""
    whole = len(ids) // length
    starts = np.linspace(0, whole - 1, min(whole, OF_DOCUMENT)).astype(int) * length
    return [ids[start : start + length] for start in starts.tolist()]


@torch.no_grad()
def inputs_of(model: LanguageModel, sequences: np.ndarray, layers: Sequence[int]) -> dict[int, np.ndarray]:
    """Return what the feed-forward part of layers gets of each token, `[tokens, hidden]` in fp32."""
    seen: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}

    def see(layer: int, _: object, given: tuple[torch.Tensor, ...]) -> None:
        seen[layer].append(given[0].flatten(0, 1).float().cpu().numpy())

    modules = [model.blocks[layer].get_submodule("mlp") for layer in layers]
    handles = [one.register_forward_pre_hook(partial(see, layer)) for one, layer in zip(modules, layers, strict=True)]
    for batch in _batches(model, sequences):
        model(batch[:, :-1])
    for handle in handles:
        handle.remove()
    return {layer: np.concatenate(parts) for layer, parts in seen.items()}


@torch.no_grad()
def loss_of(model: LanguageModel, sequences: np.ndarray) -> float:
    """Return the mean loss over the tokens of sequences, in nats."""
    total = tokens = 0.0
    for batch in map(batch_of, _batches(model, sequences)):
        total += summed_loss(model(*batch.given), model.head, batch.targets, chunked=False).item()
        tokens += batch.counted
    return total / tokens


def _batches(model: LanguageModel, sequences: np.ndarray) -> Sequence[torch.Tensor]:
    return torch.from_numpy(sequences).to(model.head.device).split(max(1, BATCH_TOKENS // sequences.shape[1]))
