"""The tokenizer that a config names: bytes, a `tokenizer.json`, a tiktoken file, or a folder with one of them."""

from typing import Any

from fsspec import AbstractFileSystem

from workers.common.errors import ConfigError, NotFoundError
from workers.common.storage import open_source, storage_errors
from workers.data.config import DataConfig
from workers.data.json_tokenizer import normal_tokenizer
from workers.data.tiktoken_file import is_tiktoken, read_config, tokenizer_of
from workers.data.tokenizer import BYTE, BYTES, Tokenizer

JSON, TIKTOKEN, ABOUT = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"


def open_tokenizer(config: DataConfig, s3_endpoint: str = "") -> Tokenizer:
    """Return the tokenizer of `data.tokenizer`.

    Args:
        config: names it, and the tokens around a document where they are not its own.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: there is none, or it cannot be used.
        StorageError: the place cannot be read.
    """
    if config.tokenizer == BYTE:
        return BYTES
    fs, path = open_source(config.tokenizer, s3_endpoint)
    try:
        with storage_errors(config.tokenizer):
            if fs.isdir(path):
                path = f"{path.rstrip('/')}/{_name_in(fs, path, config.tokenizer)}"
            data, beside = _content(fs, path), path.rpartition("/")[0] + f"/{ABOUT}"
            about = read_config(_content(fs, beside), beside) if fs.exists(beside) else {}
    except NotFoundError as error:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r}: nothing is there; name {BYTE}, a tokenizer.json, a tiktoken file, "
            "or a folder with one of them"
        ) from error
    if is_tiktoken(data):
        parsed: dict[str, Any] = tokenizer_of(data, path, about)
    elif data.lstrip()[:1] == b"{":
        parsed = read_config(data, path)
    else:
        raise ConfigError(f"data.tokenizer: {path} is no tokenizer.json and no tiktoken file{_sentencepiece(path)}")
    if "model" not in parsed:
        raise ConfigError(f"data.tokenizer: {path} is JSON, but no tokenizer.json: it has no `model`")
    if parsed == read_config(BYTES.files[JSON].encode(), JSON):  # As exports have it.
        return BYTES
    return normal_tokenizer(parsed, about, config.begin_of_document, config.end_of_document, path)


def _content(fs: AbstractFileSystem, path: str) -> bytes:
    return bytes(fs.cat_file(path))  # type: ignore[arg-type]


def _name_in(fs: AbstractFileSystem, folder: str, url: str) -> str:
    names = sorted(name.rpartition("/")[2] for name in fs.ls(folder, detail=False))
    for found in ([JSON], [TIKTOKEN], [name for name in names if name.endswith(".tiktoken")]):
        if len(found) == 1 and found[0] in names:
            return found[0]
    hint = _sentencepiece(SENTENCEPIECE) if SENTENCEPIECE in names else ""
    raise ConfigError(
        f"data.tokenizer={url!r}: there is no {JSON}, no {TIKTOKEN} and no one .tiktoken file in this folder{hint}"
    )


def _sentencepiece(path: str) -> str:
    if not path.endswith(".model"):
        return ""
    return (
        "; a SentencePiece model becomes a tokenizer.json by transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW)"
    )
