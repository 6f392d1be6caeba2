"""A prepared source: token shards in a folder, and the index that says what they are.

The folder is named after what it was made from. `index.json` is written last: a folder without it counts as nothing.
Its content hash over all shards identifies the data in every checkpoint. `prepare.py` makes such folders.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.data.json_tokenizer import read_tokenizer
from workers.data.tokenizer import BYTES, Tokenizer

BYTES_FORMAT, FORMAT = "raymuon-tokens-2", "raymuon-tokens-3"
READABLE = ("raymuon-tokens-1", BYTES_FORMAT, FORMAT)
"""The first had the ends of documents in the validation split alone, both had no documents' ends and no sums of blocks
beside the shards; runs that have trained on them can go on."""
SPLITS = ("train", "validation")
REMAKE = "`raymuon train` or `raymuon prepare` with the same config makes it again, and the same"


@dataclass(frozen=True)
class Shard:
    """A file of tokens."""

    name: str
    tokens: int
    sha256: str
    sums: str = ""
    """SHA-256 of the file beside it that has the SHA-256 of each of its blocks; empty where there is none."""
    ends: str = ""
    """SHA-256 of the file beside it that says where documents end; empty where there is none."""

    def beside(self, ending: str) -> str:
        """Return the name of a file that lies beside it."""
        return f"{self.name.removesuffix('.bin')}.{ending}"


@dataclass(frozen=True)
class Corpus:
    """A prepared source, as its index says."""

    url: str
    content_hash: str
    documents: int
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    s3_endpoint: str = ""
    """Of the S3 store that it is in, where that is not AWS."""
    name: str = ""
    """Of the source; empty where the config has `data.source`."""
    dtype: str = "uint8"
    """Of the tokens."""
    tokenizer: str = ""
    """Its hash; empty for bytes. Its files lie in the folder."""
    vocab_size: int = 256
    """All ids are below it."""
    bytes_per_token: float = 1.0
    """Of the validation split; the end of a document counts as a byte."""

    @property
    def store(self) -> Store:
        """Its folder."""
        return Store(self.url, self.s3_endpoint)

    def open_tokenizer(self) -> Tokenizer:
        """Return what has made its tokens.

        Raises:
            StorageError: its files are missing or damaged.
        """
        return read_tokenizer(self.store, self.tokenizer) if self.tokenizer else BYTES

    @staticmethod
    def tokens(shards: tuple[Shard, ...]) -> int:
        """Return the tokens in a split."""
        return sum(shard.tokens for shard in shards)


def load(store: Store, name: str = "") -> Corpus:
    """Read the index of the prepared source in a folder.

    Raises:
        StorageError: it is missing or damaged.
        ConfigError: it is of a format that this version does not know.
    """
    index = read_index(store)
    try:
        splits = {split: tuple(Shard(**shard) for shard in index[split]) for split in SPLITS}
        tokens = max(1, Corpus.tokens(splits["validation"]))
        return Corpus(
            store.url,
            index["content_hash"],
            int(index["documents"]),
            **splits,
            s3_endpoint=store.s3_endpoint,
            name=name,
            dtype=index.get("dtype", "uint8"),
            tokenizer=index.get("tokenizer", ""),
            vocab_size=int(index.get("vocab_size", 256)),
            bytes_per_token=index["bytes"]["validation"] / tokens if "bytes" in index else 1.0,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(store, error) from error


def read_index(store: Store) -> dict[str, Any]:
    """Return all that an index says; its hash is checked.

    Raises:
        StorageError: it is missing or damaged.
        ConfigError: it is of a format that this version does not know.
    """
    try:
        index = json.loads(store.read("index.json"))
        if (found := index["format"]) not in READABLE:
            raise ConfigError(
                f"{store.url}: token format {found!r}, this version reads {', '.join(READABLE)}; take the "
                "version that has made it, or another data.prepared_url"
            )
        splits = {split: index[split] for split in SPLITS}
        tokenizer = index.get("tokenizer", "")
        known = content_hash(splits, tokenizer) if found == FORMAT else _older_hash(found, splits)
        if index["content_hash"] != known:
            raise ValueError("its content hash is not that of its shards")
        return index
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(store, error) from error


def _damaged(store: Store, error: Exception) -> StorageError:
    return StorageError(f"{store.url}/index.json: damaged ({error!r}); delete it. {REMAKE}")


def content_hash(splits: Mapping[str, Any], tokenizer: str) -> str:
    """Return what identifies the tokens of all shards; for bytes what it was before there were tokenizers."""
    if tokenizer:
        return _older_hash([FORMAT, tokenizer], splits)
    plain = {
        split: [{key: one[key] for key in ("name", "tokens", "sha256")} for one in splits[split]] for split in SPLITS
    }
    return _older_hash(BYTES_FORMAT, plain)


def _older_hash(form: Any, splits: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([form, splits]).encode()).hexdigest()


def has_shards(corpus: Corpus) -> bool:
    """Tell whether all shards are there in their sizes; their hashes are checked where they are read."""
    sizes = {name: file.size for name, file in corpus.store.files("").items()}
    itemsize = np.dtype(corpus.dtype).itemsize
    return all(sizes.get(shard.name) == shard.tokens * itemsize for shard in (*corpus.train, *corpus.validation))


def num_samples(shards: tuple[Shard, ...], seq_len: int) -> int:
    """Return how many samples a split has; each needs one more token, the last target."""
    return max(0, (Corpus.tokens(shards) - 1) // seq_len)


def vocabulary_for(tokens: int) -> int:
    """Return the `model.vocab_size` to take for a tokenizer: a multiple of 128 is faster on GPUs."""
    return -(-tokens // 128) * 128


def check_vocabulary(tokens: int, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that the model does not have.

    Raises:
        ConfigError: it has.
    """
    if tokens > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size:,}: the tokenizer (data.tokenizer) has ids up to {tokens - 1:,}; set "
            f"model.vocab_size={vocabulary_for(tokens)} (a multiple of 128 is faster on GPUs), or at least {tokens}"
        )


def check_corpora(corpora: tuple[Corpus, ...], seq_len: int, global_batch: int, vocab_size: int) -> None:
    """Refuse sources that are too small, and tokens that the model does not have.

    Raises:
        ConfigError: with everything that is wrong with them.
    """
    check_vocabulary(max(corpus.vocab_size for corpus in corpora), vocab_size)
    if problems := [problem for corpus in corpora for problem in check_corpus(corpus, seq_len, global_batch)]:
        raise ConfigError("\n".join(problems))


def check_corpus(corpus: Corpus, seq_len: int, global_batch: int) -> list[str]:
    """Return what is wrong with a source for this batch; nothing where all is well."""
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
