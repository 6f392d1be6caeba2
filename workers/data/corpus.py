"""Text becomes byte-level token shards, once, at a URL that every node can read.

A prepared corpus is a folder named after what it was made from: `train-00000.bin`, ..., `validation-00000.bin` (one
byte per token) and `index.json`, which is written last: a folder without it counts as nothing. The content hash over
all shards identifies the data in every checkpoint.

The end of each document is held out. A zero byte ends a document's part in both splits: what is only in one of them is
never learned, or never measured.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fsspec import AbstractFileSystem

from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store, storage_errors
from workers.data.config import DataConfig
from workers.data.files import files_of

FORMAT = "raymuon-tokens-2"
READABLE = ("raymuon-tokens-1", FORMAT)
"""The first had the ends of documents in the validation split alone; runs that have trained on it can be replayed."""
END_OF_DOCUMENT = b"\0"
SHARD_BYTES = 64 * 2**20
SPLITS = ("train", "validation")
VALIDATORS = {"ETag", "Last-Modified", "Content-MD5", "Digest"}
"""By which a web server tells that a file is another one; fsspec's info has them under these names."""
REMAKE = "`raymuon train` with the same data.source makes it again, and the same"


@dataclass(frozen=True)
class Shard:
    """A file of tokens."""

    name: str
    tokens: int
    sha256: str
    sums: str = ""
    """SHA-256 of the file beside it that has the SHA-256 of each of its blocks; empty where there is none."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, as its index says."""

    url: str
    content_hash: str
    documents: int
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    s3_endpoint: str = ""
    """Of the S3 store that it is in, where that is not AWS."""
<<<<<<< HEAD
    name: str = ""
    """Of the source; empty where the config has `data.source`."""
    dtype: str = "uint8"
    """Of the tokens."""
    tokenizer: str = ""
    """Its hash; empty for bytes."""
=======
    dtype: str = "uint8"
    """Of its tokens."""
>>>>>>> ord

    @property
    def store(self) -> Store:
        """Its folder."""
        return Store(self.url, self.s3_endpoint)

    @staticmethod
    def tokens(shards: tuple[Shard, ...]) -> int:
        """Return the tokens in a split."""
        return sum(shard.tokens for shard in shards)


def prepare(config: DataConfig, outputs: Collection[str] = (), s3_endpoint: str = "") -> Corpus:
    """Return the prepared corpus of `config.source`; make it where it is not there yet.

    Args:
        config: what is read, and where the tokens go.
        outputs: absolute paths of the run's own files, which are no text wherever they lie.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: no file matches, or there is no text in the files.
        StorageError: a place cannot be read or written.
    """
    files = list(files_of(config.source, outputs, s3_endpoint))
    fingerprint = hashlib.sha256(repr((FORMAT, config.held_out_fraction)).encode())
    for fs, path in files:
        with storage_errors(path):
            fingerprint.update(f"{path}\0{fs.size(path)}\0{_version_of(fs, path)}\n".encode())
    store = Store(config.prepared_url, s3_endpoint).child(fingerprint.hexdigest()[:16])
    if not store.exists("index.json") or not _has_shards(corpus := load(store)):
        _write(config, files, store)
        corpus = load(store)
    return corpus


def _version_of(fs: AbstractFileSystem, path: str) -> str:
    """Return what changes with a file: fsspec's own `ukey` of web servers and archives goes by the name alone."""
    if {"http", "https"} & {*fs.protocol} and not VALIDATORS & fs.info(path).keys():
        return hashlib.sha256(fs.cat_file(path)).hexdigest()  # type: ignore[arg-type]
    return AbstractFileSystem.ukey(fs, path)


def load(store: Store) -> Corpus:
    """Read the index of the prepared corpus in a folder.

    Raises:
        StorageError: it is missing or damaged.
        ConfigError: it is of a format that this version does not know.
    """
    url = store.url
    try:
        index = json.loads(store.read("index.json"))
        if (found := index["format"]) not in READABLE:
            raise ConfigError(f"{url}: token format {found!r}, this version reads {' and '.join(READABLE)}")
        if index["content_hash"] != _content_hash(found, {split: index[split] for split in SPLITS}):
            raise ValueError("its content hash is not that of its shards")
        splits = [tuple(Shard(**shard) for shard in index[split]) for split in SPLITS]
        return Corpus(url, index["content_hash"], int(index["documents"]), *splits, s3_endpoint=store.s3_endpoint)
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{url}/index.json: damaged ({error!r}); delete it. {REMAKE}") from error


def _has_shards(corpus: Corpus) -> bool:
    """Tell whether all shards are there in their sizes; their hashes are checked where they are read."""
    sizes = {name: file.size for name, file in corpus.store.files("").items()}
    return all(sizes.get(shard.name) == shard.tokens for shard in (*corpus.train, *corpus.validation))


def num_samples(shards: tuple[Shard, ...], seq_len: int) -> int:
    """Return how many samples a split has; each needs one more token, the last target."""
    return max(0, (Corpus.tokens(shards) - 1) // seq_len)


def check_corpora(corpora: tuple[Corpus, ...], seq_len: int, global_batch: int) -> list[str]:
    """Return what is wrong with the sources for this batch; nothing where all is well."""
    return [problem for corpus in corpora for problem in check_corpus(corpus, seq_len, global_batch)]


def check_corpus(corpus: Corpus, seq_len: int, global_batch: int) -> list[str]:
    """Do the same for one source."""
    problems = []
    if (samples := num_samples(corpus.train, seq_len)) < global_batch:
        problems.append(
            f"the corpus has {samples} training sequences of {seq_len} tokens, fewer than one global batch "
            f"({global_batch}); lower train.seq_len or train.global_batch, or add text to data.source"
        )
    if Corpus.tokens(corpus.validation) <= seq_len:
        problems.append(
            f"the held-out split has {Corpus.tokens(corpus.validation)} tokens, not one sequence of {seq_len}; "
            "raise data.held_out_fraction or lower train.seq_len"
        )
    return problems


def _write(config: DataConfig, files: list[tuple[AbstractFileSystem, str]], store: Store) -> None:
    splits = {"train": _ShardWriter(store, "train"), "validation": _ShardWriter(store, "validation")}
    documents = 0
    for fs, path in files:
        with storage_errors(path):
            text = bytes(fs.cat_file(path))  # type: ignore[arg-type]
        if not text.strip():
            continue
        documents += 1
        cut = len(text) - round(len(text) * config.held_out_fraction)
        for split, part in (("train", text[:cut]), ("validation", text[cut:])):
            if part:  # An end alone would be all that a split of short documents has.
                splits[split].add(part + END_OF_DOCUMENT)
    if not documents:
        raise ConfigError(f"data.source={config.source!r}: {len(files)} file(s) found, but no text in them")
    shards = {split: [_entry(shard) for shard in writer.close()] for split, writer in splits.items()}
    content = _content_hash(FORMAT, shards)
    index = {"format": FORMAT, "content_hash": content, "source": config.source, "documents": documents, **shards}
    store.create("index.json", json.dumps(index, indent=1).encode())


def _entry(shard: Shard) -> dict[str, Any]:
    """Return what the index has of a shard; what there was not before does not change the content hash."""
    return {name: value for name, value in asdict(shard).items() if name != "sums" or value}


def _content_hash(form: str, shards: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([form, shards]).encode()).hexdigest()


class _ShardWriter:
    def __init__(self, store: Store, split: str) -> None:
        self.store, self.split = store, split
        self.buffer = bytearray()
        self.shards: list[Shard] = []

    def add(self, tokens: bytes) -> None:
        self.buffer += tokens
        while len(self.buffer) >= SHARD_BYTES:
            self._flush(SHARD_BYTES)

    def close(self) -> list[Shard]:
        if self.buffer:
            self._flush(len(self.buffer))
        return self.shards

    def _flush(self, size: int) -> None:
        tokens = bytes(self.buffer[:size])
        del self.buffer[:size]
        shard = Shard(f"{self.split}-{len(self.shards):05d}.bin", size, hashlib.sha256(tokens).hexdigest())
        # Two drivers may prepare the same corpus at once; whoever comes second finds the same bytes in place. Others
        # are damage: the folder's name says what was read.
        if not self.store.create(shard.name, tokens):
            self.store.put(shard.name, tokens)
        self.shards.append(shard)
