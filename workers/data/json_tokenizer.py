"""Any tokenizer of Hugging Face's `tokenizers`, in the form in which raymuon keeps it: two files.

`tokenizer.json` is the tokenizer without what would cut, fill up or roll dice; `tokenizer_config.json` says with which
tokens a document begins and ends, and lets transformers load both without anybody's code. They lie beside the tokens
that were made with them, in the run's folder and in its exports; their hash is part of the data's identity.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.data.chat import ChatError, ChatTemplate
from workers.data.tokenizer import Tokenizer

FOLDER = "tokenizer"
"""Where the files lie, below a prepared source and below a run."""
NAMES = ("tokenizer.json", "tokenizer_config.json")
JINJA = "chat_template.jinja"
NONE = "none"
ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|end_of_document|>")
"""By which the end of a text is known in a tokenizer.json that has no tokenizer_config.json beside it."""
SHOWN = 12
"""Special tokens in a message."""


class JsonTokenizer(Tokenizer):
    """A tokenizer out of its two files.

    Args:
        files: `tokenizer.json` and `tokenizer_config.json`, as `normal_tokenizer` makes them.
        reference: made of this `tokenizer.json` before.

    Raises:
        ValueError: they are no tokenizer, or `tokenizers` gives its tokens other ids than are written there.
    """

    engine = "tokenizers"

    def __init__(self, files: Mapping[str, str], reference: Any = None) -> None:
        self._files = {name: files[name] for name in NAMES}
        self.parsed: dict[str, Any] = json.loads(files["tokenizer.json"])
        self.reference = reference or _reference(files["tokenizer.json"])
        all_added = self.parsed.get("added_tokens") or []
        self.special = [added["content"] for added in all_added if added.get("special")]
        for added in all_added:
            if (given := self.reference.token_to_id(added["content"])) != added["id"]:
                raise ValueError(
                    f"it gives {added['content']!r} the id {added['id']}, and tokenizers gives it {given}: there are "
                    "ids below it that no token has; add reserved tokens for these"
                )
        self.vocab_size = max(self.reference.get_vocab().values(), default=-1) + 1
        about = json.loads(files["tokenizer_config.json"])
        begin, self.end = (self._id_of(about.get(name)) for name in ("bos_token", "eos_token"))
        self.begin = begin if begin != self.end else None
        canonical = json.dumps([self.parsed, self.begin, self.end], sort_keys=True, ensure_ascii=False)
        self.sha256 = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the two files; a process makes one of them only once."""
        return _loaded, tuple(self._files[name] for name in NAMES)

    @property
    def files(self) -> Mapping[str, str]:
        """The two files."""
        return self._files

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids."""
        found = self.reference.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; special tokens and ids of no token are left out."""
        return self.reference.decode([token for token in ids if token < self.vocab_size])

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as it is written in the vocabulary."""
        return self.reference.token_to_id(token)

    def token_of(self, number: int) -> str | None:
        """Return the token that has an id."""
        return self.reference.id_to_token(number)

    def marked_up(self) -> Any:
        """Return what encodes text in which special tokens are what they stand for."""
        return self._marked_up

    @cached_property
    def _marked_up(self) -> Any:
        return _reference(self._files["tokenizer.json"], as_text=False)

    @cached_property
    def put_before(self) -> int | None:
        """The id that the tokenizer's own template puts before a text."""
        ids = self.reference.encode("", add_special_tokens=True).ids
        return ids[0] if ids and ids[0] != self.end else None

    def _id_of(self, token: str | None) -> int | None:
        if token is None:
            return None
        if (found := self.id_of(token)) is None:
            raise ValueError(f"{token!r} is no token of it")
        return found


def _reference(text: str, as_text: bool = True) -> Any:
    from tokenizers import Tokenizer as Reference

    try:
        reference = Reference.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower.
        raise ValueError(f"tokenizers cannot read it: {error}") from error
    reference.encode_special_tokens = as_text  # What looks like a special token in a text is text.
    return reference


@lru_cache(maxsize=2)
def _loaded(*texts: str) -> JsonTokenizer:
    return JsonTokenizer(dict(zip(NAMES, texts, strict=True)))


def normal_tokenizer(parsed: dict[str, Any], about: dict[str, Any], begin: str, end: str, where: str) -> JsonTokenizer:
    """Return the tokenizer of files as people have them.

    Args:
        parsed: `tokenizer.json`.
        about: `tokenizer_config.json`, or nothing.
        begin: token that begins a document, `none`, or empty for what the tokenizer itself puts before a text.
        end: token that ends a document, `none`, or empty for the tokenizer's own.
        where: its URL, for messages.

    Raises:
        ConfigError: it is none, or it does not say what ends a document.
    """
    parsed = {**parsed, "truncation": None, "padding": None}  # Either would change a text without a word.
    if isinstance(parsed.get("model"), dict) and parsed["model"].get("dropout"):
        parsed["model"] = {**parsed["model"], "dropout": None}
    text = json.dumps(parsed, ensure_ascii=False)

    def made(begin: str | None, end: str | None, reference: Any = None) -> JsonTokenizer:
        config = json.dumps(_config(about, begin, end), indent=2, ensure_ascii=False)
        try:
            return JsonTokenizer(dict(zip(NAMES, (text, config), strict=True)), reference)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"data.tokenizer: {where} cannot be used: {error}") from error

    plain = made(None, None)
    ends = _chosen(plain, "end", end, where) if end else _own_end(plain, about, where)
    if begin:
        begins = _chosen(plain, "begin", begin, where)
    elif about.get("add_bos_token") and about.get("bos_token"):
        begins = content(about["bos_token"])
    else:
        begins = None if plain.put_before is None else plain.token_of(plain.put_before)
    return made(begins, ends, plain.reference)


def _chosen(tokenizer: JsonTokenizer, which: str, token: str, where: str) -> str | None:
    if token == NONE:
        return None
    if tokenizer.id_of(token) is None:
        raise ConfigError(f"data.{which}_of_document={token!r} is no token of {where}; {_known(tokenizer)}")
    return token


def _own_end(tokenizer: JsonTokenizer, about: dict[str, Any], where: str) -> str:
    if about.get("eos_token"):
        return content(about["eos_token"])
    found = [token for token in ENDS if token in tokenizer.special]
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"data.tokenizer: {where} does not say which token ends a document (no eos_token in a tokenizer_config.json "
        f"beside it); set data.end_of_document to it, or to {NONE}; {_known(tokenizer)}"
    )


def _known(tokenizer: JsonTokenizer) -> str:
    shown = ", ".join(tokenizer.special[:SHOWN]) or "none"
    more = f" and {len(tokenizer.special) - SHOWN} more" if len(tokenizer.special) > SHOWN else ""
    return f"its special tokens are {shown}{more}"


def content(token: str | dict[str, Any]) -> str:
    """Return a token of tokenizer_config.json, which may be an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else token


def _config(about: dict[str, Any], begin: str | None, end: str | None) -> dict[str, Any]:
    """Return what is kept of `tokenizer_config.json`: where nothing begins a document, the end of one does."""
    kept = {"chat_template": about["chat_template"]} if about.get("chat_template") else {}
    special = {"bos_token": begin or end, "eos_token": end, "pad_token": end or begin}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: token for name, token in special.items() if token is not None},
        "clean_up_tokenization_spaces": False,
        **kept,
    }


def write_tokenizer(store: Store, tokenizer: Tokenizer) -> None:
    """Write a tokenizer's files into its folder below `store`; bytes need none."""
    if tokenizer.sha256:
        for name, text in tokenizer.files.items():
            store.put(f"{FOLDER}/{name}", text.encode())


def write_template(store: Store, template: ChatTemplate) -> None:
    """Write a chat template beside the tokenizer's files, where transformers looks for one."""
    store.put(f"{FOLDER}/{JINJA}", template.source.encode())


def read_template(store: Store, sha256: str, now: datetime | None = None) -> ChatTemplate:
    """Return the chat template whose file lies below `store`.

    Args:
        store: of a prepared source or a run.
        sha256: of it.
        now: what it is told where it asks for the time.

    Raises:
        StorageError: it is missing or damaged.
    """
    try:
        template = ChatTemplate(store.read(f"{FOLDER}/{JINJA}").decode(), now)
    except (ChatError, UnicodeDecodeError) as error:
        raise StorageError(f"{store.url}/{FOLDER}/{JINJA}: damaged ({error})") from error
    if template.sha256 != sha256:
        raise StorageError(f"{store.url}/{FOLDER}/{JINJA}: damaged (its hash is {template.sha256}, not {sha256})")
    return template


def copy_tokenizer(source: Store, target: Store, names: Sequence[str]) -> None:
    """Lay files of the tokenizer of `source` down at `target`, where they are not there yet."""
    for name in names:
        if not target.exists(path := f"{FOLDER}/{name}"):
            target.put(path, source.read(path))


def read_tokenizer(store: Store, sha256: str) -> JsonTokenizer:
    """Return the tokenizer whose files lie below `store`.

    Raises:
        StorageError: they are missing or damaged.
    """
    texts = [text.decode() for text in store.read_all([f"{FOLDER}/{name}" for name in NAMES])]
    try:
        tokenizer = _loaded(*texts)
        if tokenizer.sha256 != sha256:
            raise ValueError(f"its hash is {tokenizer.sha256}, not {sha256}")
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{store.url}/{FOLDER}: damaged ({error})") from error
    return tokenizer
