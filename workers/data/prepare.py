"""Text becomes token shards, once, at a URL that every node can read.

A source's files are cut into pieces, neighbouring pieces are put into groups, and each group makes one shard for each
split. Pieces and groups depend on the files alone, so the bytes are the same whoever makes which group when: any number
of tasks, or this process. A finished group leaves a note, written last; a group that has one is not made again. When
all have one, the index is written out of them, and they go.

What is held out is never learned: the end of each text file, or whole rows by the hash of their text. The end of a
document ends its part in both splits: what is only in one of them is never learned, or never measured.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from workers.common.errors import ConfigError, NotFoundError
from workers.common.storage import Store, storage_errors
from workers.data.config import DataConfig, SourceConfig
from workers.data.corpus import BYTES_FORMAT, FORMAT, SPLITS, Corpus, content_hash, has_shards, load
from workers.data.documents import TOKENS, documents, pieces_of
from workers.data.files import files_of, files_of_urls
from workers.data.gigatoken_encoder import UnequalIds, encoder_of
from workers.data.json_tokenizer import write_tokenizer
from workers.data.pieces import Piece
from workers.data.shard_writer import ShardWriter
from workers.data.token_files import token_documents
from workers.data.tokenizer import Encoder, Tokenizer
from workers.data.tokenizer_files import open_tokenizer

GROUP_BYTES = 64 * 2**20
"""Of text that makes one shard for each split; more where there would be more groups than MOST_GROUPS."""
MOST_GROUPS = 10_000
BATCH_BYTES = 1 << 20
"""Of text that is encoded at once."""
BAD_SHOWN = 20
VALIDATORS = {"ETag", "Last-Modified", "Content-MD5", "Digest"}
"""By which a web server tells that a file is another one; fsspec's info has them under these names."""
KEY = np.dtype("V16")
"""Of a document, for duplicates: the first half of its text's SHA-256."""


@dataclass(frozen=True)
class Recipe:
    """How the documents of a source become tokens."""

    field: str
    held_out: str
    held_out_fraction: float
    max_bad_documents: int
    key: str
    """Of the config, for messages."""
    s3_endpoint: str = ""


@dataclass(frozen=True)
class Group:
    """Neighbouring pieces of a source that make one shard for each split."""

    number: int
    first: int
    """Number of its first piece in the source."""
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Of its note."""
        return f"groups/{self.number:05d}.json"

    @property
    def size(self) -> int:
        """In bytes of input."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Work:
    """A source that is to be prepared, or is."""

    name: str
    store: Store
    """Its own folder."""
    recipe: Recipe
    tokenizer: Tokenizer
    groups: tuple[Group, ...]
    after: tuple[Store, ...] = ()
    """Sources whose documents are left out of this one, and this one, where duplicates are."""

    def prepared(self) -> Corpus | None:
        """Return it where it is there whole."""
        if not self.store.exists("index.json") or not has_shards(corpus := load(self.store, self.name)):
            return None
        return corpus

    def missing(self) -> list[Group]:
        """Return the groups that nobody has finished yet."""
        there = {*self.store.names("groups")}
        return [group for group in self.groups if Path(group.name).name not in there]


def works_of(config: DataConfig, outputs: Collection[str] = (), s3_endpoint: str = "") -> list[Work]:
    """Return what there is to prepare, source by source; it reads no more than lists and the files' first bytes.

    Args:
        config: what is read, and where the tokens go.
        outputs: absolute paths of the run's own files, which are no text wherever they lie.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: no file matches, or one is not of the format that was named.
        StorageError: a place cannot be looked at.
    """
    works: list[Work] = []
    tokenizer = open_tokenizer(config, s3_endpoint)
    for source in config.sources or (None,):
        if source is None:
            files, key = files_of(config.source, outputs, s3_endpoint), f"data.source={config.source!r}"
            source = SourceConfig(name="source", urls=(config.source,))
            name = ""
        else:
            key, name = f"data.sources[{source.name}]", source.name
            files = files_of_urls(source.urls, outputs, s3_endpoint, f"{key}.urls")
        versions, pieces = [], []
        for fs, path in files:
            with storage_errors(path):
                versions.append(f"{path}\0{fs.size(path)}\0{_version_of(fs, path)}\n")
            pieces += pieces_of(fs, path, source.format, s3_endpoint)
        _refuse_both(pieces, key)
        recipe = Recipe(
            source.field,
            *(config.held_out, config.held_out_fraction, config.max_bad_documents, key, s3_endpoint),
        )
        made_of: tuple[Any, ...] = (BYTES_FORMAT, config.held_out_fraction)
        if not _is_as_ever(recipe, tokenizer, pieces, config.deduplicate):
            made_of = (FORMAT, config.held_out_fraction, config.held_out, source.format, source.field)
            made_of += (tokenizer.sha256,) if tokenizer.sha256 else ()
            made_of += tuple(work.store.url for work in works) if config.deduplicate else ()
            made_of += (config.deduplicate,)
        fingerprint = hashlib.sha256(repr(made_of).encode())
        for version in versions:
            fingerprint.update(version.encode())
        store = Store(config.prepared_url, s3_endpoint).child(fingerprint.hexdigest()[:16])
        after = (*(work.store for work in works), store) if config.deduplicate else ()
        works.append(Work(name, store, recipe, tokenizer, tuple(groups_of(pieces)), after))
    return works


def _refuse_both(pieces: list[Piece], key: str) -> None:
    """Refuse a source that has tokens and texts."""
    tokens = next((piece.url for piece in pieces if piece.format in TOKENS), None)
    text = next((piece.url for piece in pieces if piece.format not in TOKENS), None)
    if tokens and text:
        raise ConfigError(
            f"{key}: {tokens} holds tokens, and {text} does not; give each kind a source of its own (data.sources)"
        )


def _is_as_ever(recipe: Recipe, tokenizer: Tokenizer, pieces: list[Piece], deduplicate: bool) -> bool:
    """Tell whether the tokens are what they were when there was nothing but text files and bytes.

    Their folder has the name that it had, and they have the hash that they had.
    """
    plain = all(piece.format == "text" and not piece.compression for piece in pieces)
    return plain and not tokenizer.sha256 and not deduplicate and recipe.held_out != "documents"


def _version_of(fs: AbstractFileSystem, path: str) -> str:
    """Return what changes with a file: fsspec's own `ukey` of web servers and archives goes by the name alone."""
    if {"http", "https"} & {*fs.protocol} and not VALIDATORS & fs.info(path).keys():
        return hashlib.sha256(fs.cat_file(path)).hexdigest()  # type: ignore[arg-type]
    return AbstractFileSystem.ukey(fs, path)


def groups_of(pieces: list[Piece]) -> Iterator[Group]:
    """Yield the pieces in groups of about GROUP_BYTES."""
    most = max(GROUP_BYTES, sum(piece.size for piece in pieces) // MOST_GROUPS)
    first, size, number = 0, 0, 0
    for at, piece in enumerate(pieces):
        if size and size + piece.size > most:
            yield Group(number, first, tuple(pieces[first:at]))
            first, size, number = at, 0, number + 1
        size += piece.size
    if pieces:
        yield Group(number, first, tuple(pieces[first:]))


def prepare(config: DataConfig, outputs: Collection[str] = (), s3_endpoint: str = "") -> tuple[Corpus, ...]:
    """Return the prepared sources of a config; make here, one group after another, what is not there yet.

    Args:
        config: what is read, and where the tokens go.
        outputs: absolute paths of the run's own files, which are no text wherever they lie.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: no file matches, there is no text in the files, or more documents are bad than may be.
        StorageError: a place cannot be read or written.
    """
    return tuple(work.prepared() or prepare_work(work) for work in works_of(config, outputs, s3_endpoint))


Each = Callable[[Callable[[Work, Group], Any], Work, Iterable[Group]], Iterable[tuple[Group, Any]]]
"""Does something with each group of a source, and yields each one that is done, and what came of it."""


def one_by_one(do: Callable[[Work, Group], Any], work: Work, groups: Iterable[Group]) -> Iterator[tuple[Group, Any]]:
    """Do it in this process."""
    return ((group, do(work, group)) for group in groups)


def prepare_work(
    work: Work,
    each: Each = one_by_one,
    told: Callable[[Work, Group, dict[str, Any]], object] = lambda work, group, note: None,
) -> Corpus:
    """Make what is not there yet of a source, and return it.

    Args:
        work: the source.
        each: goes through the groups.
        told: called with each group that is made, and its note.
    """
    try:
        if work.after:
            for _ in each(keep_keys, work, work.groups):
                pass
        for group, note in each(make_group, work, work.missing()):
            told(work, group, note)
        return finish(work)
    except NotFoundError:
        # Somebody else has finished it meanwhile, and cleared away what we were writing.
        if (corpus := work.prepared()) is None:
            raise
        return corpus


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
        for document in documents(piece, recipe.field, bad):
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
            for batch in _batches(kept):
                numbers["documents"] += len(batch)
                parts = [part for one in batch for part in _parts(recipe, tokenizer, group, *one)]
                for (split, number, row, text), ids in zip(parts, encoder.encode([p[3] for p in parts]), strict=True):
                    writers[split].add(_ended(ids, tokenizer), number, row)
                    numbers["bytes"][split] += len(text) + 1
        shards = {split: writer.publish() for split, writer in writers.items()}
    note = {
        **numbers,
        "duplicates": len(skipped),
        "bad": len(bad),
        "bad_shown": bad[:BAD_SHOWN],
        "engine": encoder.engine,
        "shards": {split: shard and asdict(shard) for split, shard in shards.items()},
    }
    work.store.put(group.name, json.dumps(note).encode())
    return note


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


def finish(work: Work) -> Corpus:
    """Write the index out of the groups' notes, and return the source.

    Raises:
        ConfigError: more documents are bad than may be, or there is no text at all.
        StorageError: a note is missing or cannot be read.
    """
    store, recipe = work.store, work.recipe
    notes = [json.loads(text) for text in store.read_all([group.name for group in work.groups])]
    if sum(note["bad"] for note in notes) > recipe.max_bad_documents:
        raise too_many(recipe, [told for note in notes for told in note["bad_shown"]])
    if not sum(note["documents"] for note in notes):
        raise ConfigError(f"{recipe.key}: files were found, but there is no text in them")
    tokenizer = work.tokenizer
    write_tokenizer(store, tokenizer)
    splits = {split: [note["shards"][split] for note in notes if note["shards"][split]] for split in SPLITS}
    index = {
        "format": FORMAT,
        "content_hash": content_hash(splits, tokenizer.sha256),
        "dtype": tokenizer.dtype.name,
        "tokenizer": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "documents": sum(note["documents"] for note in notes),
        "duplicates": sum(note["duplicates"] for note in notes),
        "bad": sum(note["bad"] for note in notes),
        "bad_shown": [told for note in notes for told in note["bad_shown"]][:BAD_SHOWN],
        "engines": sorted({note["engine"] for note in notes}),
        "bytes": {split: sum(note["bytes"][split] for note in notes) for split in SPLITS},
        "pieces": [[p.url, p.format, p.start, p.stop, p.compression] for group in work.groups for p in group.pieces],
        **splits,
    }
    store.put("index.json", json.dumps(index, indent=1).encode())
    for folder in ("", "groups/", "keys/"):
        for name in store.names(folder):
            if name.startswith("."):  # Of a process that was killed.
                store.remove(folder + name)
    for group in work.groups:
        store.remove(group.name)
    return load(store, work.name)
