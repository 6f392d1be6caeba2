"""A group of a source's files becomes a shard for each split, and a note of what is in them.

The bytes are the same whoever makes them, and when.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from workers.common.errors import ConfigError
from workers.data.chat import ChatError, ChatTemplate, read
from workers.data.chat_encoder import encode
from workers.data.corpus import SPLITS
from workers.data.documents import TOKENS, documents, place_in
from workers.data.gigatoken_encoder import UnequalIds, encoder_of
from workers.data.shard_writer import ShardWriter
from workers.data.token_files import token_documents
from workers.data.tokenizer import Encoder, Tokenizer
from workers.data.work import Group, Recipe, Work

BATCH_BYTES = 1 << 20
"""Of text that is encoded at once."""
BAD_SHOWN = 20
KEY = np.dtype("V16")
"""Of a document, for duplicates: the first half of its text's SHA-256."""


def keep_keys(work: Work, group: Group) -> None:
    """Write down the keys of a group's documents, for whoever leaves out duplicates."""
    name = _keys_name(group)
    if not work.store.exists(name):
        keys = [_key(text) for _, _, text in _texts(work.recipe, group, lambda told: None)]
        work.store.put(name, b"".join(keys))


def _keys_name(group: Group) -> str:
    return f"keys/{group.number:05d}.bin"


def _key(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[: KEY.itemsize]


def _duplicates(work: Work, group: Group) -> set[int]:
    """Return which documents of a group, counted from 0, were there before: in it, or in what comes before it."""
    keys: list[bytes] = []
    for store in work.after:
        for name in store.names("keys"):
            if store == work.store and name >= Path(_keys_name(group)).name:
                break
            keys.append(store.read(f"keys/{name}"))
    own = np.frombuffer(work.store.read(_keys_name(group)), KEY)
    before = np.frombuffer(b"".join(keys), KEY)
    _, first = np.unique(np.concatenate([before, own]), return_index=True)
    return set(range(len(own))) - {*(first[first >= len(before)] - len(before)).tolist()}


def _texts(recipe: Recipe, group: Group, bad: Callable[[str], None]) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number of the piece, the row in it, and the text of each document of a group."""
    for number, piece in enumerate(group.pieces, group.first):
        for document in documents(piece, recipe.field, bad, recipe.template is not None):
            yield number, document.row, document.text


def make_group(work: Work, group: Group) -> dict[str, Any]:
    """Write a group's shards, and then its note, which is returned.

    Raises:
        ConfigError: more of its documents are bad than may be.
        StorageError: a place cannot be read or written.
    """
    encoder = encoder_of(work.tokenizer)
    try:
        return _make_group(work, group, encoder)
    except UnequalIds:
        return _make_group(work, group, work.tokenizer)


def _make_group(work: Work, group: Group, encoder: Encoder) -> dict[str, Any]:
    recipe, tokenizer, bad = work.recipe, work.tokenizer, []
    tell = _limited(recipe, bad)
    skipped = _duplicates(work, group) if work.after else set()
    numbers = {"documents": 0, "bytes": dict.fromkeys(SPLITS, 0)}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(work.store, f"{split}-{group.number:05d}.bin", tokenizer.dtype))
            for split in SPLITS
        }
        if group.pieces[0].format in TOKENS:
            _copy(recipe, group, tokenizer, writers, numbers, tell)
        else:
            kept = (one for at, one in enumerate(_texts(recipe, group, tell)) if at not in skipped)
            if recipe.template:
                _converse(recipe, recipe.template, group, tokenizer, kept, writers, numbers, tell)
            else:
                _encode(recipe, group, tokenizer, encoder, kept, writers, numbers)
        shards = {split: writer.publish() for split, writer in writers.items()}
    note = {
        **numbers,
        "duplicates": len(skipped),
        "bad": len(bad),
        "bad_shown": bad[:BAD_SHOWN],
        "engine": "tokenizers" if recipe.template else encoder.engine,
        "shards": {split: shard and shard.entry for split, shard in shards.items()},
    }
    work.store.put(group.name, json.dumps(note).encode())
    return note


def _encode(
    recipe: Recipe,
    group: Group,
    tokenizer: Tokenizer,
    encoder: Encoder,
    documents: Iterable[tuple[int, int, bytes]],
    writers: dict[str, ShardWriter],
    numbers: dict[str, Any],
) -> None:
    """Make tokens of texts, many at a time."""
    for batch in _batches(documents):
        numbers["documents"] += len(batch)
        parts = [part for one in batch for part in _parts(recipe, tokenizer, group, *one)]
        for (split, number, row, text), ids in zip(parts, encoder.encode([p[3] for p in parts]), strict=True):
            writers[split].add(_ended(ids, tokenizer), number, row)
            numbers["bytes"][split] += len(text) + 1


def _converse(
    recipe: Recipe,
    template: ChatTemplate,
    group: Group,
    tokenizer: Tokenizer,
    documents: Iterable[tuple[int, int, bytes]],
    writers: dict[str, ShardWriter],
    numbers: dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    """Make tokens of conversations: what begins and ends one is the template's affair."""
    counted: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for number, row, document in documents:
        try:
            found = encode(template, tokenizer, read(document))
        except ChatError as error:
            tell(f"{place_in(group.pieces[number - group.first], row)}: {error}")
            continue
        split = _split_of(recipe, document)
        writers[split].add(found.ids, number, row, found.counts)
        numbers["documents"] += 1
        numbers["bytes"][split] += found.said_bytes
        counted[split] += int(found.counts[1:].sum())
    numbers["counted"] = counted


def _limited(recipe: Recipe, bad: list[str]) -> Callable[[str], None]:
    """Return what takes note of a bad document, until there are too many."""

    def tell(told: str) -> None:
        bad.append(told)
        if len(bad) > recipe.max_bad_documents:
            raise too_many(recipe, bad)

    return tell


def too_many(recipe: Recipe, bad: list[str]) -> ConfigError:
    """Return the end of a preparation by bad documents."""
    shown = "\n".join(f"  {one}" for one in bad[:BAD_SHOWN])
    return ConfigError(
        f"{recipe.key}: {len(bad)} document(s) cannot be read, data.max_bad_documents={recipe.max_bad_documents}:\n"
        f"{shown}\nmend or leave out the files, or raise data.max_bad_documents to train without these documents"
    )


def _batches(documents: Iterable[tuple[int, int, bytes]]) -> Iterator[list[tuple[int, int, bytes]]]:
    batch, size = [], 0
    for one in documents:
        batch.append(one)
        size += len(one[2])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(
    recipe: Recipe, tokenizer: Tokenizer, group: Group, number: int, row: int, text: bytes
) -> Iterator[tuple[str, int, int, bytes]]:
    """Yield the splits that have something of a document, and what."""
    ends = recipe.held_out == "ends" or (recipe.held_out == "auto" and row == 0)
    if not ends:
        yield _split_of(recipe, text), number, row, text
        return
    cut = len(text) - round(len(text) * recipe.held_out_fraction)
    while tokenizer.sha256 and 0 < cut < len(text) and text[cut] & 0xC0 == 0x80:  # Within a character.
        cut -= 1
    for split, part in (("train", text[:cut]), ("validation", text[cut:])):
        if part:  # An end alone would be all that a split of short documents has.
            yield split, number, row, part


def _split_of(recipe: Recipe, content: bytes) -> str:
    """Return the split of a document that is held out whole: it goes by its content, wherever it stands."""
    share = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
    return "validation" if share < recipe.held_out_fraction else "train"


def _ended(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    around = [[] if special is None else [special] for special in (tokenizer.begin, tokenizer.end)]
    return np.concatenate([np.array(around[0], ids.dtype), ids, np.array(around[1], ids.dtype)])


def _copy(
    recipe: Recipe,
    group: Group,
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    numbers: dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    """Take tokens that somebody has made already, as they are; documents are held out by the hash of their tokens."""
    for number, piece in enumerate(group.pieces, group.first):
        for ids, row in token_documents(piece, tokenizer.vocab_size, tell):
            stored = ids.astype(tokenizer.dtype)
            split = _split_of(recipe, stored.tobytes())
            writers[split].add(stored, number, row)
            numbers["documents"] += 1
            if split == "validation":  # Of the training split nobody asks for it, and decoding takes its time.
                numbers["bytes"][split] += _text_bytes(tokenizer, ids)


def _text_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Return the bytes of a document's text; its end counts as one."""
    if not tokenizer.sha256:
        return len(ids)
    return len(tokenizer.decode(ids.tolist()).encode()) + int(tokenizer.end in ids[-1:])
