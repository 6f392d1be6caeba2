"""What makes token ids out of text, and text out of ids."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

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


class ByteTokenizer(Tokenizer):
    """Every byte is a token; a zero byte ends a document."""

    vocab_size, begin, end, sha256, engine = 256, None, END_OF_DOCUMENT, "", "bytes"

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


BYTES = ByteTokenizer()
