"""The tokenizer that a config names (bytes, a `tokenizer.json`, a tiktoken file, or a folder with one of them), and the
template of its conversations."""

from datetime import datetime
from typing import Any

from fsspec import AbstractFileSystem

from workers.common.errors import ConfigError, NotFoundError
from workers.common.storage import open_source, storage_errors
from workers.common.text import kind_of
from workers.data.chat import PLAIN, SPECIAL, ChatError, ChatTemplate, bound
from workers.data.config import DataConfig
from workers.data.json_tokenizer import JINJA, content, normal_tokenizer
from workers.data.tiktoken_file import is_tiktoken, read_config, tokenizer_of
from workers.data.tokenizer import BYTE, BYTES, Tokenizer

JSON, TIKTOKEN, ABOUT = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"
PLAIN_NAME = "plain"
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
    fs, path = _located(config, s3_endpoint)
    with storage_errors(config.tokenizer):
        data, about = _content(fs, path), _about(fs, path)
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


def open_template(config: DataConfig, tokenizer: Tokenizer, s3_endpoint: str = "") -> ChatTemplate:
    """Return the template that writes a config's conversations.

    Args:
        config: names it, and the tokenizer.
        tokenizer: the config's.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: there is none, or it cannot be used.
        StorageError: the place cannot be read.
    """
    named, about, special = config.chat_template, {}, _special(tokenizer)
    key, source = f"data.chat_template={named!r}", PLAIN
    if tokenizer.sha256 and named != PLAIN_NAME:
        fs, path = _located(config, s3_endpoint)
        with storage_errors(config.tokenizer):
            about = _about(fs, path)
            own = "" if named else _own_template(fs, path, about)
        special |= {name: content(about[name]) for name in SPECIAL if about.get(name)}
        key, source = (key, own) if named else (f"data.tokenizer={config.tokenizer!r}: its chat template", own)
    if named not in ("", PLAIN_NAME):
        fs, path = open_source(named, s3_endpoint)
        try:
            with storage_errors(named):
                source = _content(fs, path).decode()
        except (NotFoundError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}: no text file is there; name {PLAIN_NAME}, or a file of Jinja") from error
    if not source:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r}: it has no chat template (no chat_template in its {ABOUT}, no "
            f"{JINJA} beside it); set data.chat_template={PLAIN_NAME}, or name a file of Jinja"
        )
    if source == PLAIN and tokenizer.end is None:
        raise ConfigError(
            f"data.chat_template={PLAIN_NAME} ends what the assistant says with the tokenizer's end of a document, and "
            "there is none; set data.end_of_document"
        )
    try:
        return ChatTemplate(bound(source, special), _date(config.chat_date))
    except ChatError as error:
        raise ConfigError(f"{key}: {error}") from error


def _date(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError as error:
        raise ConfigError(f"data.chat_date={text!r}: {error}") from error


def _special(tokenizer: Tokenizer) -> dict[str, str]:
    """Return what begins and ends a document."""
    ids = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end}
    found = {name: tokenizer.token_of(number) for name, number in ids.items() if number is not None}
    return {name: token for name, token in found.items() if token is not None}


def _own_template(fs: AbstractFileSystem, path: str, about: dict[str, Any]) -> str:
    """Return the template of the tokenizer at a path; empty where it has none.

    Raises:
        ConfigError: it is no text.
    """
    beside = _beside(path, JINJA)
    if fs.exists(beside):
        try:
            return _content(fs, beside).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.tokenizer: {beside} is no UTF-8 ({error})") from error
    found = about.get("chat_template") or ""
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):  # Several, by name.
        found = {one.get("name"): one.get("template") for one in found}.get("default", "")
    if not isinstance(found, str):
        where = _beside(path, ABOUT)
        raise ConfigError(
            f"data.tokenizer: chat_template in {where} is {kind_of(found)}, and no text, nor texts by name; set "
            "data.chat_template to a file of Jinja"
        )
    return found


def _located(config: DataConfig, s3_endpoint: str) -> tuple[AbstractFileSystem, str]:
    """Return where the tokenizer's file is."""
    fs, path = open_source(config.tokenizer, s3_endpoint)
    try:
        with storage_errors(config.tokenizer):
            if fs.isdir(path):
                path = f"{path.rstrip('/')}/{_name_in(fs, path, config.tokenizer)}"
            fs.info(path)
            return fs, path
    except NotFoundError as error:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer!r}: nothing is there; name {BYTE}, a tokenizer.json, a tiktoken file, "
            "or a folder with one of them"
        ) from error


def _beside(path: str, name: str) -> str:
    return path.rpartition("/")[0] + f"/{name}"


def _about(fs: AbstractFileSystem, path: str) -> dict[str, Any]:
    """Return the tokenizer_config.json beside a tokenizer; empty where there is none."""
    beside = _beside(path, ABOUT)
    return read_config(_content(fs, beside), beside) if fs.exists(beside) else {}


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
