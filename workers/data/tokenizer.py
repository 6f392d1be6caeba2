"""What makes token ids out of text, and text out of ids."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from workers.data.byte_tokenizer import END_OF_DOCUMENT, byte_tokenizer

BYTE = "byte"
"""Names the byte tokenizer in a config."""


class Encoder(Protocol):
    """What makes ids out of texts; of one tokenizer all encoders make the same ids."""

    engine: str
    """The library that encodes."""

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of texts in UTF-8, without `begin` and `end`."""
        ...


class Tokenizer(ABC):
    """A map between texts and ids."""

    vocab_size: int
    """Ids are below it."""
    begin: int | None
    """Put before each document."""
    end: int | None
    """Put after each document."""
    sha256: str
    """Of all that decides on ids; empty for bytes."""
    engine: str
    """The library that encodes."""
    special: Sequence[str]
    """The special tokens, as they are written."""

    @property
    def dtype(self) -> np.dtype:
        """What ids are stored in."""
        return np.dtype("u1" if self.vocab_size <= 256 else "<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    @abstractmethod
    def files(self) -> Mapping[str, str]:
        """The files by which Hugging Face's libraries know the tokenizer, and their text."""

    @abstractmethod
    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of texts in UTF-8, without `begin` and `end`."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; what stands for no text is left out."""

    @abstractmethod
    def token_of(self, number: int) -> str | None:
        """Return the token that has an id, as it is written."""

    @abstractmethod
    def marked_up(self) -> Any:
        """Return the `tokenizers.Tokenizer` for text in which special tokens are what they stand for."""


class ByteTokenizer(Tokenizer):
    """Every byte is a token; a zero byte ends a document."""

    vocab_size, begin, end, sha256, engine = 256, None, END_OF_DOCUMENT, "", "bytes"
    special = (chr(END_OF_DOCUMENT),)

    @property
    def files(self) -> Mapping[str, str]:
        """The files that make the same ids."""
        return byte_tokenizer()

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the bytes."""
        return [np.frombuffer(text, np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; what is no byte is left out."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def token_of(self, number: int) -> str | None:
        """Return the character of a byte."""
        return chr(number) if number < 128 else None

    def marked_up(self) -> Any:
        """Return the same as Hugging Face's libraries have it."""
        return _as_tokenizers_has_it()


@lru_cache(maxsize=1)
def _as_tokenizers_has_it() -> Any:
    from tokenizers import Tokenizer as Reference

    return Reference.from_str(byte_tokenizer()["tokenizer.json"])


BYTES = ByteTokenizer()
