"""`raymuon data`: what prepared text holds, and which documents and tokens a step of a run had.

Both read what lies in storage, and no config: a step's samples are a pure function of the run's seed and the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jobs.load import load_values
from jobs.record import read_record
from jobs.runs import TrackedRun
from orchestrator.config import RunConfig
from orchestrator.identity import data_identity, of_data, refuse_other
from orchestrator.log.run_log import RunLog
from orchestrator.preflight import corpora_of
from orchestrator.record.journal import read_journal
from workers.common.errors import ConfigError
from workers.common.storage import Store, absolute_url
from workers.data.corpus import SPLITS, Corpus, load
from workers.data.ends import DocumentEnds
from workers.data.tokenizer import Tokenizer
from workers.data.tokens import TokenSplit

SHOWN_TOKENS = 200
"""Of a document's beginning."""


@dataclass(frozen=True)
class Piece:
    """What a sample has of one document."""

    file: str
    row: int
    """In the file, from 1; 0: the whole file."""
    first: int
    """The piece's first token, counted from the document's."""
    tokens: int
    text: str


@dataclass(frozen=True)
class Sample:
    """One sequence of a step."""

    index: int
    """Of the whole run, from 0."""
    slot: int
    """The micro-batch slot that it was in."""
    source: str
    epoch: int
    sample: int
    """Number in the source."""
    pieces: list[Piece]


def samples_at(found: TrackedRun, step: int) -> list[Sample]:
    """Return what a step of a run was trained on, in the order of its global batch.

    Raises:
        ConfigError: the run had no such step, or its tokens are not those that it was trained on.
        StorageError: its files or its tokens cannot be read.
    """
    from workers.feed import Part, indices_of_step, order_of  # Imports torch.

    config, corpora = _trained_on(found, step)
    train, order = config.train, order_of(config.data, config.recipe, config.train.seq_len, config.seed, corpora)
    part = Part([(corpus, corpus.train) for corpus in corpora], train.seq_len, config.data.cache_gb)
    indices = indices_of_step(config.recipe, step)
    drawn, samples, tokenizer = order.at(indices), [], corpora[0].open_tokenizer()
    for number, index in enumerate(indices.tolist()):
        source, sample = int(drawn.source[number]), int(drawn.sample[number])
        tokens = part.tokens[source].sample(sample)
        pieces = list(_pieces(tokens, part.tokens[source].ranges(sample), part.ends[source], tokenizer))
        slot, epoch = number // train.micro_batch, int(drawn.epoch[number])
        samples.append(Sample(index, slot, corpora[source].name, epoch, sample, pieces))
    part.close()
    return samples


def _pieces(
    tokens: np.ndarray, ranges: list[tuple[int, int]], ends: DocumentEnds, tokenizer: Tokenizer
) -> Iterator[Piece]:
    """Yield what of each document is in a sample that has these ranges of its split's tokens, one after the other."""
    for start, stop in ranges:
        for stretch in ends.stretches(start, stop):
            first, last = max(stretch.start, start), min(stretch.stop, stop)
            text = tokenizer.decode(tokens[first - start : last - start].tolist())
            yield Piece(stretch.file, stretch.row, first - stretch.start, last - first, text)
        tokens = tokens[stop - start :]


def _trained_on(found: TrackedRun, step: int) -> tuple[RunConfig, tuple[Corpus, ...]]:
    """Return the config that a step was trained with, and its sources."""
    record = read_record(read_journal(found.store, lambda text: None))
    if not record.attempts:
        raise ConfigError(f"run {found.run_id}: no driver has begun to lead it, so nothing tells its data")
    attempt = record.attempts[record.by.get(step, max(record.attempts))]
    config = load_values(attempt.config, [], f"of run {found.run_id}")
    if not 1 <= step <= config.train.steps:
        raise ConfigError(f"step {step}: run {found.run_id} has steps 1 to {config.train.steps}")
    corpora = corpora_of(attempt.corpora, config.storage.s3_endpoint or found.s3_endpoint)
    known = of_data(RunLog(found.store).identity or {})
    refuse_other(found.url, known, data_identity(config, corpora), step)
    return config, corpora


@dataclass(frozen=True)
class Shown:
    """What a prepared source holds."""

    url: str
    content_hash: str
    dtype: str
    tokenizer: str
    """Its hash; empty for bytes."""
    documents: int
    splits: dict[str, dict[str, float]]
    """Tokens, shards, and the lengths of documents in tokens in the first shard, by split."""
    bytes_per_token: float
    first: list[tuple[str, str]]
    """The first documents of the training split: file and row, and the beginning of the text."""


def show(url: str, documents: int, s3_endpoint: str = "") -> list[Shown]:
    """Return what the prepared sources in a folder, or in the folders below it, hold.

    Raises:
        ConfigError: there are none.
        StorageError: they cannot be read, or are damaged.
    """
    store = Store(absolute_url(url.rstrip("/")), s3_endpoint)
    folders = [store] if store.exists("index.json") else [store.child(name) for name in store.names("")]
    found = [_shown(load(folder), documents) for folder in folders if folder.exists("index.json")]
    if not found:
        raise ConfigError(f"{url}: no prepared tokens there (no index.json in it, nor in a folder of it)")
    return found


def _shown(corpus: Corpus, documents: int) -> Shown:
    splits = {}
    for split in SPLITS:
        shards = getattr(corpus, split)
        splits[split] = {"tokens": Corpus.tokens(shards), "shards": len(shards)}
        if shards and shards[0].ends:
            lengths = DocumentEnds(corpus, shards).lengths(0)
            splits[split] |= {"median_length": float(np.median(lengths)), "largest_length": float(lengths.max())}
    first = []
    if corpus.train and corpus.train[0].ends and documents:
        tokenizer = corpus.open_tokenizer()
        ends, tokens = DocumentEnds(corpus, corpus.train), TokenSplit(corpus, corpus.train, 1)
        for stretch in ends.stretches(0, corpus.train[0].tokens)[:documents]:
            last = min(stretch.stop, stretch.start + SHOWN_TOKENS)
            ids = tokens.batch(range(stretch.start, min(last, tokens.num_samples)))[:, 0].tolist()
            first.append((place_of(stretch.file, stretch.row), tokenizer.decode(ids)))
        tokens.close()
    return Shown(
        *(corpus.url, corpus.content_hash, corpus.dtype, corpus.tokenizer, corpus.documents, splits),
        bytes_per_token=corpus.bytes_per_token,
        first=first,
    )


def place_of(file: str, row: int) -> str:
    """Return what a document is called."""
    return f"{file}:{row}" if row else file
