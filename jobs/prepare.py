"""`raymuon prepare`: text to tokens, before a run or by the run itself."""

import time
from collections.abc import Callable
from typing import Any

from jobs.screen import Screen
from jobs.tell import tell
from orchestrator.config import RunConfig, absolute, database_files
from orchestrator.preflight import check_data
from orchestrator.stop import StopSignal
from workers.data.corpus import Corpus, check_vocabulary, read_index
from workers.data.enough import told, too_long
from workers.data.prepare import GROUP_BYTES, Group, Work, prepare_work, works_of

TELL_S = 2.0
"""Between two lines."""


def prepare(config: RunConfig, address: str | None, stop: StopSignal, as_json: bool) -> None:
    """Prepare all sources of a config, and say what they hold.

    Raises:
        RaymuonError: with its exit code.
    """
    run_config, console = absolute(config), Screen(stderr=as_json)
    corpora = prepared(run_config, address, stop, console)
    check_data(run_config, corpora)
    found = [summary(corpus) for corpus in corpora]
    for one in found:
        console.print(
            f"{one['name'] or 'text'}: {one['tokens']:,} tokens to train on, {one['held_out_tokens']:,} held out, of "
            f"{one['documents']:,} documents, {one['bytes_per_token']:.2f} bytes per token, {one['duplicates']} "
            f"duplicate(s) and {one['bad']} bad one(s) left out, by {', '.join(one['engines'])}; in {one['url']}"
        )
    if as_json:
        tell(found)


def prepared(
    config: RunConfig,
    address: str | None,
    stop: StopSignal,
    console: Screen,
    before: Callable[[], object] = lambda: None,
) -> tuple[Corpus, ...]:
    """Return the prepared sources of a run.

    What is not there yet is made: what is small here, the rest by tasks, for it is not to be in a driver's memory.

    Args:
        config: of the run.
        address: of a Ray cluster for the tasks.
        stop: tells when a person wants it to end.
        console: shows what is done.
        before: called before anything is made; raises where nothing is to be.

    Raises:
        RaymuonError: with its exit code.
    """
    with stop.abruptly():
        works = works_of(config.data, database_files(config.tracking.uri), config.storage.s3_endpoint)
        check_vocabulary(works[0].tokenizer.vocab_size, config.model.vocab_size)  # Before hours of work.
        found = [work.prepared() for work in works]
        missing = [work for work, corpus in zip(works, found, strict=True) if corpus is None]
        if missing:
            before()
        small = sum(group.size for work in missing for group in work.groups) <= GROUP_BYTES
        made = [prepare_work(work) for work in missing] if small else []
    if not small:
        from orchestrator.preparation import prepare_on  # Ray takes a second to import.

        made = prepare_on(missing, address, stop, _Progress(missing, console).told)
    rest = iter(made)
    whole = tuple(corpus or next(rest) for corpus in found)
    for corpus in whole:
        if corpus.chat_template and too_long(corpus, config.train.seq_len) <= config.data.max_long_conversations:
            console.print(told(corpus, config.train.seq_len), style="dim")
    return whole


def summary(corpus: Corpus) -> dict[str, Any]:
    """Return what there is to say of a prepared source."""
    index = read_index(corpus.store)
    return {
        "name": corpus.name,
        "url": corpus.url,
        "tokens": Corpus.tokens(corpus.train),
        "held_out_tokens": Corpus.tokens(corpus.validation),
        "documents": corpus.documents,
        "bytes_per_token": corpus.bytes_per_token,
        "duplicates": index.get("duplicates", 0),
        "bad": index.get("bad", 0),
        "engines": index.get("engines", ["bytes"]),
        "tokenizer": corpus.tokenizer,
        "content_hash": corpus.content_hash,
    }


class _Progress:
    """Says how far it is."""

    def __init__(self, works: list[Work], console: Screen) -> None:
        self.total = sum(group.size for work in works for group in work.missing())
        self.console, self.began, self.said = console, time.monotonic(), 0.0
        self.documents = self.bytes = 0
        console.print(f"preparing {len(works)} source(s), {self.total / 1e6:,.1f} MB", style="dim")

    def told(self, work: Work, group: Group, note: dict[str, Any]) -> None:
        """Take note of a finished group."""
        self.documents += note["documents"]
        self.bytes += group.size
        now = time.monotonic()
        if now - self.said < TELL_S and self.bytes < self.total:
            return
        self.said, rate = now, self.bytes / max(1e-9, now - self.began)
        left = (self.total - self.bytes) / max(1e-9, rate)
        self.console.print(
            f"{work.name or 'text'}: {self.bytes / 1e6:,.1f} of {self.total / 1e6:,.1f} MB, "
            f"{self.documents:,} documents, {rate / 1e6:,.1f} MB/s, {left:,.0f} s left",
            style="dim",
        )
