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
from typing import Any

from fsspec import AbstractFileSystem

from workers.common.errors import ConfigError, NotFoundError
from workers.common.storage import Store, storage_errors
from workers.data.chat import ChatTemplate
from workers.data.config import DataConfig, SourceConfig
from workers.data.corpus import BYTES_FORMAT, CHAT_FORMAT, FORMAT, SPLITS, Corpus, content_hash, load
from workers.data.documents import TOKENS, pieces_of
from workers.data.files import files_of, files_of_urls
from workers.data.groups import BAD_SHOWN, keep_keys, make_group, too_many
from workers.data.json_tokenizer import write_template, write_tokenizer
from workers.data.pieces import Piece
from workers.data.tokenizer import Tokenizer
from workers.data.tokenizer_files import open_template, open_tokenizer
from workers.data.work import Group, Recipe, Work

GROUP_BYTES = 64 * 2**20
"""Of text that makes one shard for each split; more where there would be more groups than MOST_GROUPS."""
MOST_GROUPS = 10_000
VALIDATORS = {"ETag", "Last-Modified", "Content-MD5", "Digest"}
"""By which a web server tells that a file is another one; fsspec's info has them under these names."""


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
    template = open_template(config, tokenizer, s3_endpoint) if config.chats else None
    for source in config.sources or (None,):
        if source is None:
            files, key = files_of(config.source, outputs, s3_endpoint), f"data.source={config.source!r}"
            source = SourceConfig(name="source", urls=(config.source,), format=config.format)
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
            source.text_field,
            *(config.held_out, config.held_out_fraction, config.max_bad_documents, key, s3_endpoint),
            template=template if source.format == "chat" else None,
        )
        made_of: tuple[Any, ...] = (BYTES_FORMAT, config.held_out_fraction)
        if not _is_as_ever(recipe, tokenizer, pieces, config.deduplicate):
            made_of = (FORMAT, config.held_out_fraction, config.held_out, source.format, source.text_field)
            made_of += (CHAT_FORMAT, *recipe.template.identity) if recipe.template else ()
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


def _of_conversations(template: ChatTemplate, notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what an index has of conversations alone."""
    counted = {split: sum(note["counted"][split] for note in notes) for split in SPLITS}
    return {"chat_template": template.sha256, "counted": counted}


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
    plain = recipe.template is None and all(piece.format == "text" and not piece.compression for piece in pieces)
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
    if recipe.template:
        write_template(store, recipe.template)
    splits = {split: [note["shards"][split] for note in notes if note["shards"][split]] for split in SPLITS}
    form = CHAT_FORMAT if recipe.template else FORMAT
    index = {
        "format": form,
        "content_hash": content_hash(form, splits, tokenizer.sha256),
        "dtype": tokenizer.dtype.name,
        "tokenizer": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "documents": sum(note["documents"] for note in notes),
        "duplicates": sum(note["duplicates"] for note in notes),
        "bad": sum(note["bad"] for note in notes),
        "bad_shown": [told for note in notes for told in note["bad_shown"]][:BAD_SHOWN],
        "engines": sorted({note["engine"] for note in notes}),
        "bytes": {split: sum(note["bytes"][split] for note in notes) for split in SPLITS},
        **(_of_conversations(recipe.template, notes) if recipe.template else {}),
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
