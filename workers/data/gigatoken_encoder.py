"""gigatoken encodes many times faster than `tokenizers`, and is young: it is believed only where both give equal ids.

It must give them on texts that are hard to split, when it is loaded, and on a sample of every batch.
"""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from workers.common.errors import RaymuonError
from workers.data.json_tokenizer import JsonTokenizer
from workers.data.tiktoken_file import PATTERNS, tiktoken_of
from workers.data.tokenizer import Encoder, Tokenizer

SAMPLE_BYTES = 4096
"""Of each batch that both encode: a twentieth of the time, where gigatoken is as much faster as it was seen."""
KIMI = "kimi"
"""Both gigatoken's and our name of the pattern; gigatoken knows it by name only."""
PROBES = (
    "",
    " ",
    "\n\n  \n\t x\r\n\r\n y \u00a0z\u3000",
    "I'm we'LL they'Re 'tis don\u2019t x's'S",
    "1 12 123 1234 12345.678e-9 \u0663\u0664\u0665 \u00bd\u00b2 \u2167",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \u0130stanbul stra\u00dfe \ufb01n \u01c5 \u1e9e",
    "\u4f60\u597d\uff0c\u4e16\u754c 123\u5e74 \u65e5\u672c\u8a9e\u30c6\u30b9\u30c8",
    "\ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2603\ufe0f \U00020000 \U0010ffff \ufeff\u200b",
    "\x00\x01\x7f\u0080 a\x00b",
    "def f(x):\n    return {'a': [1, 2]}  # ok\n\n\nclass A_b(C):\n\tpass\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 40 + "----------------!!!!??..",
)


class UnequalIds(Exception):
    """Both have given other ids for the same text, or gigatoken has failed."""


class GigatokenEncoder:
    """Encodes with gigatoken, and checks a sample of each batch.

    Args:
        tokenizer: the reference.

    Raises:
        UnequalIds: gigatoken is not here, does not know such a tokenizer, or gives other ids for texts that are hard to
            split.
    """

    engine = "gigatoken"

    def __init__(self, tokenizer: JsonTokenizer) -> None:
        with _failures():
            self.tokenizer, self._fast = tokenizer, _load(tokenizer.parsed)
        around = [f"a{special}b {special}" for special in tokenizer.special[:256]]
        self._compare([text.encode() for text in (*PROBES, *around)])

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids.

        Raises:
            UnequalIds: gigatoken's are not the reference's.
        """
        if not texts:
            return []
        self._compare([_sample(texts)])
        return self._ids(texts)

    def _ids(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        with _failures():
            layout = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets, ids = np.asarray(layout.offsets), np.asarray(layout.content.data)
        return [ids[first:last] for first, last in pairwise(offsets)]

    def _compare(self, texts: list[bytes]) -> None:
        for text, ours, theirs in zip(texts, self.tokenizer.encode(texts), self._ids(texts), strict=True):
            if not np.array_equal(ours, theirs):
                raise UnequalIds(text[:80])


@contextmanager
def _failures() -> Iterator[None]:
    """Make whatever gigatoken raises, Rust's panics too, which are no `Exception`, one kind of failure."""
    try:
        yield
    except (RaymuonError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UnequalIds(str(error)) from error


def _sample(texts: Sequence[bytes]) -> bytes:
    """Return a piece of one text of a batch, always the same one for the same batch."""
    chance = random.Random(len(texts) ^ sum(map(len, texts)))
    text = chance.choice(texts)
    start = chance.randrange(max(1, len(text) - SAMPLE_BYTES))
    return text[start : start + SAMPLE_BYTES].decode(errors="ignore").encode()


def _load(parsed: dict[str, Any]) -> Any:
    from gigatoken import Tokenizer as Fast

    if (tokens := tiktoken_of(parsed, PATTERNS[KIMI])) is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "tokens.tiktoken")
            path.write_bytes(tokens)
            return Fast.from_tiktoken(path, pretokenizer=KIMI)
    added = parsed.get("added_tokens") or []
    # gigatoken takes special tokens in a text for what they say; to us they are text.
    return Fast.from_json(json.dumps({**parsed, "added_tokens": [one for one in added if not one.get("special")]}))


@lru_cache(maxsize=2)
def _encoder(tokenizer: JsonTokenizer) -> Encoder:
    try:
        return GigatokenEncoder(tokenizer)
    except UnequalIds:
        return tokenizer


def encoder_of(tokenizer: Tokenizer) -> Encoder:
    """Return the fastest encoder that gives a tokenizer's ids."""
    return _encoder(tokenizer) if isinstance(tokenizer, JsonTokenizer) else tokenizer
