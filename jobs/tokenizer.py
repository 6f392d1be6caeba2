"""`raymuon tokenizer train`: a tokenizer of one's own text."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass

from jobs.screen import Screen
from orchestrator.preflight import in_background
from workers.common.errors import ConfigError
from workers.common.storage import Store, shared_url
from workers.data.documents import documents, pieces_of
from workers.data.files import files_of
from workers.data.json_tokenizer import normal_tokenizer
from workers.data.tiktoken_file import PATTERNS, splitting

END = "<|endoftext|>"
SMALLEST = 257
"""All bytes, and the end of a document."""
PATTERN = PATTERNS["cl100k_base"]
"""Splits a text into words: contractions, letters with what is before them, up to three digits, the rest."""
TELL_S = 2.0
"""Between two lines."""
SAMPLE_BYTES = 4 << 20
"""Of the text, on which bytes per token are measured."""


@dataclass(frozen=True)
class Trained:
    """What a training has made."""

    url: str
    vocab_size: int
    sha256: str
    documents: int
    bytes: int
    bytes_per_token: float
    """Of the first SAMPLE_BYTES of the text that it was trained on."""
    seconds: float


def train_tokenizer(
    source: str, vocab: int, to: str, field: str, most_mb: float, console: Screen, s3_endpoint: str = ""
) -> Trained:
    """Train a byte-level BPE (https://arxiv.org/abs/1508.07909) on a source's text, and write it into a new folder.

    Args:
        source: as `data.source`.
        vocab: of the tokens, how many there shall be.
        to: the folder, an fsspec URL.
        field: that holds the text, in a row.
        most_mb: of text that is learned from, in MB; 0: all.
        console: told how far it is.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: a file is no text, there is too little, or something is in the folder already.
        StorageError: a place cannot be read or written.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Reference

    if vocab < SMALLEST:
        raise ConfigError(f"--vocab {vocab}: {SMALLEST} is the least: every byte, and the end of a document")
    target = Store(shared_url(to), s3_endpoint)
    if target.names(""):
        raise ConfigError(f"--to {to}: something is there already; name a new folder")
    began, reading = time.monotonic(), _Reading(source, field, most_mb, console, s3_endpoint)
    learned = Reference(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[AddedToken(END, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    training = in_background(lambda: learned.train_from_iterator(reading.texts(), trainer), may_be_torn=True)
    while not training.done():  # A person can interrupt: Rust merges for minutes and hears nobody.
        wait([training], timeout=0.1)
    training.result()
    if (found := learned.get_vocab_size()) < vocab:
        raise ConfigError(
            f"--vocab {vocab}: this text has no more than {found} tokens that occur twice; name a smaller vocabulary, "
            "or more text"
        )
    parsed = {**json.loads(learned.to_str()), "pre_tokenizer": splitting(PATTERN)}
    tokenizer = normal_tokenizer(parsed, {"eos_token": END}, "", "", to)
    for name, text in tokenizer.files.items():
        target.put(name, text.encode())
    tokens = sum(map(len, tokenizer.encode(reading.sample)))
    per_token = sum(map(len, reading.sample)) / max(1, tokens)
    seconds = time.monotonic() - began
    return Trained(
        target.url, tokenizer.vocab_size, tokenizer.sha256, reading.documents, reading.bytes, per_token, seconds
    )


class _Reading:
    """The texts that are learned from, and how far it is with them."""

    def __init__(self, source: str, field: str, most_mb: float, console: Screen, s3_endpoint: str) -> None:
        files = files_of(source, (), s3_endpoint)
        self.pieces = [piece for fs, path in files for piece in pieces_of(fs, path, "auto", s3_endpoint)]
        self.field, self.console = field, console
        self.most = int(most_mb * 1e6) or sum(piece.size for piece in self.pieces) * 1000
        self.documents = self.bytes = 0
        self.sample: list[bytes] = []

    def texts(self) -> Iterator[str]:
        """Yield them one after another."""
        said = time.monotonic()
        for piece in self.pieces:
            for document in documents(piece, self.field, _refuse):
                if self.bytes >= self.most:
                    return
                if self.bytes < SAMPLE_BYTES:
                    self.sample.append(document.text)
                self.documents += 1
                self.bytes += len(document.text)
                yield document.text.decode()
                if time.monotonic() - said > TELL_S:
                    said = time.monotonic()
                    self.console.print(f"{self.documents:,} documents, {self.bytes / 1e6:,.1f} MB read", style="dim")
        self.console.print(f"{self.documents:,} documents, {self.bytes / 1e6:,.1f} MB read; merging", style="dim")


def _refuse(told: str) -> None:
    raise ConfigError(f"{told}; mend or leave out the file")
