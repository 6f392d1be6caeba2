"""A prepared source: token shards in a folder, and the index that says what they are.

The folder is named after what it was made from. `index.json` is written last: a folder without it counts as nothing.
Its content hash over all shards identifies the data in every checkpoint. `prepare.py` makes such folders.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.data.json_tokenizer import JINJA, NAMES, read_tokenizer
from workers.data.tokenizer import BYTES, Tokenizer

BYTES_FORMAT, FORMAT, CHAT_FORMAT = "raymuon-tokens-2", "raymuon-tokens-3", "raymuon-tokens-4"
"""The last is of conversations alone: whoever does not know it would learn what everybody says in them."""
READABLE = ("raymuon-tokens-1", BYTES_FORMAT, FORMAT, CHAT_FORMAT)
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
    counts: str = ""
    """SHA-256 of the file beside it that says which tokens are learned; empty where all are."""

    @property
    def entry(self) -> dict[str, Any]:
        """What an index has of it."""
        return {key: value for key, value in asdict(self).items() if key != "counts" or value}

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
    """Of the validation split; the end of a document counts as a byte. Of conversations, what the assistant says."""
    chat_template: str = ""
    """Hash of what has written its conversations; empty where it has none. It lies in the folder, too."""

    @property
    def store(self) -> Store:
        """Its folder."""
        return Store(self.url, self.s3_endpoint)

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """What lies in its folder of a tokenizer and a chat template."""
        return (*(NAMES if self.tokenizer else ()), *((JINJA,) if self.chat_template else ()))

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
        tokens = index["counted"]["validation"] if "counted" in index else Corpus.tokens(splits["validation"])
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
            bytes_per_token=index["bytes"]["validation"] / max(1, tokens) if "bytes" in index else 1.0,
            chat_template=index.get("chat_template", ""),
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
        known = content_hash(found, splits, tokenizer) if found in (FORMAT, CHAT_FORMAT) else _hash(found, splits)
        if index["content_hash"] != known:
            raise ValueError("its content hash is not that of its shards")
        return index
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(store, error) from error


def _damaged(store: Store, error: Exception) -> StorageError:
    return StorageError(f"{store.url}/index.json: damaged ({error!r}); delete it. {REMAKE}")


def content_hash(form: str, splits: Mapping[str, Any], tokenizer: str) -> str:
    """Return what identifies the tokens of all shards; for bytes what it was before there were tokenizers."""
    if tokenizer or form == CHAT_FORMAT:
        return _hash([form, tokenizer], splits)
    plain = {
        split: [{key: one[key] for key in ("name", "tokens", "sha256")} for one in splits[split]] for split in SPLITS
    }
    return _hash(BYTES_FORMAT, plain)


def _hash(form: Any, splits: Mapping[str, Any]) -> str:
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
