"""Tiktoken files as a `tokenizer.json`: the ids are those of the tiktoken library, on texts of every kind."""

import base64
import json
import random
import sysconfig
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from workers.common.errors import ConfigError
from workers.data.tiktoken_file import PATTERNS, byte_characters, is_tiktoken, tokenizer_of

SIZE = 2000
POOLS = [  # Escaped: some look like others, or are not seen.
    "abc XYZ 's 'LL '\u017f",
    "0123456789\u0663\xbd\xb2\u2167",
    " \t\n\r\x0b\x0c\x85\xa0\u2028\u3000\u180e\ufeff\u200b",
    "\u65e5\u672c\u8a9e\u6f22\u5b57\u3005\u3006\u30f6\ud55c\uad6d\uc5b4",
    "\U0001f600\U0001f3f3\ufe0f\u200d\U0001f308\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\xe9\xc5e\u0301\u01c5\u02b0\xdf\u0130\u0131\u03a3\u03c2\ufb01",
    "<|>[]{}/'_-",
    "\x00\x7f",
    "\U00010000\U0010ffff\u0378",
    "\u0627\u064e\u0644\u0652\u0939\u093f\u0928\u094d\u0926\u0940\u0e44\u0e17\u0e22",
]


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    """The tokens of a small byte-level vocabulary, in the order of their merges."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    texts = [file.read_text(errors="replace") for file in library]
    texts += ["日本語の漢字 中文English混合 " * 50, "it's WE'LL émigré 😀😀 " * 50]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
    )
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    in_order = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    return [bytes(bytes_of[character] for character in token) for token, _ in in_order]


def file_of(ranks: list[bytes]) -> bytes:
    return b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks))


def config_of(pattern: str) -> dict:
    special = {"[BOS]": SIZE, "[EOS]": SIZE + 1}
    known = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "added_tokens_decoder": {str(number): {"content": text, "special": True} for text, number in special.items()},
    }
    return known if pattern == "kimi" else {**known, "pat_str": pattern}


def strings(dice: random.Random, count: int):
    for number in range(count):
        if number % 3:
            yield "".join(dice.choice(dice.choice(POOLS)) for _ in range(dice.randrange(30)))
        else:
            planes = (0x250, 0x3000, 0x30000)
            codes = (dice.randrange(dice.choice(planes)) for _ in range(dice.randrange(1, 20)))
            yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_ids_are_tiktokens(ranks, pattern):
    found = Tokenizer.from_str(json.dumps(tokenizer_of(file_of(ranks), "x/tiktoken.model", config_of(pattern))))
    found.encode_special_tokens = True
    special = {"[BOS]": SIZE, "[EOS]": SIZE + 1}
    mergeable = {token: rank for rank, token in enumerate(ranks)}
    known = tiktoken.Encoding("x", pat_str=PATTERNS[pattern], mergeable_ranks=mergeable, special_tokens=special)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:5]
    texts = [file.read_text(errors="replace") for file in library]
    texts += ["", "a[EOS]b[BOS]", "漢" * 3000, "x" * 20000, *strings(random.Random(1), 2000)]
    for text in texts:
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == known.encode(text, disallowed_special=()), ascii(text[:60])
        assert found.decode(ids, skip_special_tokens=False) == text
    assert found.token_to_id("[EOS]") == SIZE + 1


def test_a_file_without_a_known_pattern_is_refused_with_the_key_that_names_one(ranks):
    with pytest.raises(ConfigError, match="pat_str"):
        tokenizer_of(file_of(ranks), "x/unknown.tiktoken", {})


def test_what_is_such_a_file(ranks):
    assert is_tiktoken(file_of(ranks)) and not is_tiktoken(b"{}") and not is_tiktoken(b"") and not is_tiktoken(b"a b\n")
