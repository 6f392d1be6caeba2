"""A tiktoken file as a `tokenizer.json`, so that one form of every tokenizer is hashed, kept and exported.

A tiktoken file has the tokens in the order in which pairs are merged, and nothing else: the pattern that splits a text
into words is in the program that goes with it. It must be known, by the file's name or by the tokenizer's class, or be
named; it is never guessed, for another one gives other ids without an error.
"""

import base64
import binascii
import json
from typing import Any

from workers.common.errors import ConfigError
from workers.data.byte_tokenizer import byte_characters

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_REST = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")


def _cased(upper: str, lower: str) -> tuple[str, str]:
    """Return the words that end in small letters, and those that begin with capitals, each with its contraction."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}[{upper}]*[{lower}]+{_CONTRACTIONS}?", f"{before}[{upper}]+[{lower}]*{_CONTRACTIONS}?"


_NO_HAN = r"&&[^\p{Han}]"
PATTERNS = {
    # Moonlight's and Kimi's, from `tokenization_moonshot.py` and `tokenization_kimi.py` beside their weights.
    "kimi": "|".join(
        (
            r"[\p{Han}]+",
            *_cased(_UPPER + _NO_HAN, _LOWER + _NO_HAN),
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            *_REST,
        )
    ),
    # OpenAI's, from `tiktoken_ext/openai_public.py`.
    "o200k_base": "|".join(
        (*_cased(_UPPER, _LOWER), r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
    ),
    "cl100k_base": "|".join(
        (_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", *_REST)
    ),
    "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
"""That split a text into words, by the names of the files that they go with; `kimi` goes by the tokenizer's class."""
KIMI_MODULES = ("tokenization_moonshot", "tokenization_kimi")
KIMI_RESERVED = 256
"""Special tokens after the ranks: those that `added_tokens_decoder` does not name are reserved ones."""


def is_tiktoken(data: bytes) -> bool:
    """Tell whether a file begins with a line of base64 and a rank."""
    try:
        _line(data[:4096].split(b"\n", 1)[0])
    except ValueError:
        return False
    return True


def tokenizer_of(data: bytes, where: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the `tokenizer.json` of a tiktoken file.

    Args:
        data: the file's content.
        where: its URL.
        config: `tokenizer_config.json` beside it, or nothing.

    Raises:
        ConfigError: a line is none, the ranks have gaps, or the pattern is not known.
    """
    pattern, reserved = _pattern(where, config)
    ranks = _ranks(data, where)
    letters = byte_characters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    special = {int(key): value for key, value in config.get("added_tokens_decoder", {}).items()}
    last = max([len(ranks) + reserved - 1, *special])
    added = []
    for number in range(len(ranks), last + 1):  # Without gaps: tokenizers would give other ids than are written here.
        about = special.get(number, {})
        about = about if isinstance(about, dict) else {"content": str(about)}
        token = about.get("content", f"<|reserved_token_{number}|>")
        added.append({**_ADDED, "id": number, "content": token, "special": bool(about.get("special", True))})
    if wrong := sorted(number for number in special if number < len(ranks)):
        raise ConfigError(
            f"{where}: {len(ranks):,} tokens have the ids up to {len(ranks) - 1:,}, and added_tokens_decoder gives "
            f"{wrong[0]} to another one; take the tokenizer_config.json that goes with this file"
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": splitting(pattern),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # A word that is a token is that token, whatever its merges come to.
            "vocab": {written[token]: rank for token, rank in ranks.items()},
            "merges": [[written[left], written[right]] for left, right in _merges(ranks)],
        },
    }


def tiktoken_of(parsed: dict[str, Any], pattern: str) -> bytes | None:
    """Return the tiktoken file of a `tokenizer.json` that was made here with this pattern; None where it was not."""
    if parsed.get("pre_tokenizer") != splitting(pattern):
        return None
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    lines = []
    for written, rank in sorted(parsed["model"]["vocab"].items(), key=lambda one: one[1]):
        lines.append(base64.b64encode(bytes(byte_of[character] for character in written)) + b" %d\n" % rank)
    return b"".join(lines)


def splitting(pattern: str) -> dict[str, Any]:
    """Return the `pre_tokenizer` that splits a text by a pattern, and writes its bytes as letters."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def _pattern(where: str, config: dict[str, Any]) -> tuple[str, int]:
    """Return the pattern that splits a text, and how many special tokens come after the ranks."""
    module = config.get("auto_map", {}).get("AutoTokenizer") or ""
    module = next((part for part in module if part), "") if isinstance(module, list) else module
    module = module.rpartition("--")[2].split(".")[0]  # A module of another repository is REPOSITORY--MODULE.CLASS.
    kimi = config.get("tokenizer_class") == "TikTokenTokenizer" and module in ("", *KIMI_MODULES)
    named = config.get("pat_str") or where.rpartition("/")[2].removesuffix(".tiktoken")
    reserved = KIMI_RESERVED if kimi else 0
    if kimi and "pat_str" not in config:
        return PATTERNS["kimi"], reserved
    if named in PATTERNS:
        return PATTERNS[named], reserved
    if "pat_str" in config:
        return named, reserved
    raise ConfigError(
        f"data.tokenizer: {where} does not say by which pattern a text is split into words, and another one gives "
        f'other ids; write it into tokenizer_config.json beside it, as "pat_str": a regular expression, or one of '
        f"{', '.join(PATTERNS)}"
    )


def _ranks(data: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = _line(line)
        except ValueError as error:
            raise ConfigError(
                f"{where}:{number}: {line[:60]!r} is not a token in base64 and its rank ({error})"
            ) from error
        if token in ranks or rank != len(ranks):
            raise ConfigError(
                f"{where}:{number}: rank {rank} of {token!r} is not the next one, {len(ranks)}, or the token was there "
                "before; the file is damaged, or not tiktoken's"
            )
        ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ConfigError(
            f"{where}: {len(missing)} of the 256 bytes are no tokens, {missing[0]} among them, so not every text has "
            "ids; the file is damaged"
        )
    return ranks


def _line(line: bytes) -> tuple[bytes, int]:
    token, rank = line.split()
    try:
        return base64.b64decode(token, validate=True), int(rank)
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return, in order, the pairs that tokens are merged from.

    tiktoken merges the pair whose concatenation has the lowest rank, whichever pair that is; so every pair of two
    tokens that makes a third is a merge, at its rank. Pairs of one token are equal in rank there, and the leftmost is
    taken; here they have an order, and no text has shown a difference yet.
    """
    merges = []
    for token in ranks:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        # Pairs whose parts come first in rank are what a training would have merged.
        found = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(found, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def read_config(data: bytes, where: str) -> dict[str, Any]:
    """Return an object of JSON.

    Raises:
        ConfigError: it is none.
    """
    try:
        read = json.loads(data)
        if not isinstance(read, dict):
            raise ValueError(f"it begins a {type(read).__name__}")
    except ValueError as error:
        raise ConfigError(
            f"{where}: not a JSON object ({error}); take the file that goes with the tokenizer"
        ) from error
    return read
