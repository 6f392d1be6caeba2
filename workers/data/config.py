"""What is trained on: sources of text, their mixture, and where the tokens go."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm
from typing import Literal

from optim.checks import Check, filled, named, no_password, require, within

Format = Literal["auto", "text", "jsonl", "parquet", "arrow", "npy", "megatron", "chat"]
MAX_DENOMINATOR = 100_000
"""Of the sources' shares: the mixture repeats after so many samples at most, and is exact in each repetition."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """A named source of documents."""

    name: str
    """What metrics and messages call it: letters, digits, `-`, `_` and `.`."""
    urls: tuple[str, ...]
    """Files, folders and globs, of any fsspec URL."""
    format: Format = "auto"
    """Of the files; `auto` goes by their names and first bytes. gzip and zstd are seen by their first bytes. `npy` and
    `megatron` (`.bin` with its `.idx`) hold tokens already. `chat`: rows of conversations, of which what the assistant
    says is learned."""
    field: str = ""
    """That holds the text, in a row of JSONL, Parquet or Arrow; empty: `text`, and `messages` in a chat."""
    weight: float = 1.0
    """Its share of the samples, relative to the others'."""

    def __post_init__(self) -> None:
        require(
            self,
            *named(self, "name"),
            (not self.field or bool(self.field.strip()), "field must name the text's field; it is blank"),
            (bool(self.urls) and all(url.strip() for url in self.urls), "urls must name files; one or all are empty"),
            *no_password(self, "urls"),
            *within(self, "(0, inf)", "weight"),
        )

    @property
    def text_field(self) -> str:
        """The field that is read."""
        return self.field or ("messages" if self.format == "chat" else "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """The sources' weights from a step on."""

    step: int
    """The first step that they hold for."""
    weights: dict[str, float] = field(hash=False)
    """By source; one that is left out, or has 0, gives nothing."""

    def __post_init__(self) -> None:
        require(
            self,
            *within(self, "[2, inf)", "step"),
            (any(weight > 0 for weight in self.weights.values()), "weights must have one above 0"),
            *(
                (0 <= weight < float("inf"), f"weights.{name} must be 0 or more, not {weight}")
                for name, weight in self.weights.items()
            ),
        )


SOURCE = "python-stdlib"
"""Of `data.source`, where nothing is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The text, its tokens, and the order in which they are read."""

    source: str = SOURCE
    """Text: a file, a folder or a glob, of any fsspec URL, several with commas between them, or `python-stdlib`, the
    standard library's own source code, or `python-stdlib/json`, a folder of it. Hidden files below a folder and what
    runs have written are left out. With `format=chat`, Python source is conversations about its functions."""
    format: Format = "auto"
    """Of `source`, as a source of `sources` has one of its own. `chat`: each row has a list of `messages`, and what the
    assistant says in them is learned."""
    sources: tuple[SourceConfig, ...] = ()
    """Named sources with weights, in the place of `source`."""
    mixture: tuple[MixtureConfig, ...] = ()
    """Other weights of the sources from a step on; nothing before that step moves."""
    tokenizer: str = "byte"
    """`byte`, or a tokenizer.json, a tiktoken file, or a folder with one of them (fsspec URL)."""
    begin_of_document: str = ""
    """Token that is put before each document: empty for what the tokenizer itself puts before a text, or `none`."""
    end_of_document: str = ""
    """Token that is put after each document: empty for the tokenizer's own, or `none`."""
    chat_template: str = ""
    """Writes conversations: `plain`, or a file of Jinja (fsspec URL); empty: the tokenizer's own, of bytes `plain`."""
    chat_date: str = ""
    """Today's date for a template that asks for it, as 2026-11-30; empty: such a template is refused."""
    max_long_conversations: int = 0
    """Conversations of a source that may be longer than `train.seq_len` and are left out; one more ends the run before
    it begins. None is ever cut."""
    deduplicate: bool = False
    """Leave out documents whose text was there before, in this source or in one before it."""
    max_bad_documents: int = 0
    """Documents of a source that may be unreadable and are left out; one more ends the preparation."""
    held_out: Literal["auto", "ends", "documents"] = "auto"
    """What is kept for validation: the end of each document, or whole documents by the hash of their text. `auto`: ends
    of text files, whole rows of others."""
    held_out_fraction: float = 0.03
    """Share of the text that is kept for validation."""
    window: int = 0
    """Samples of a source among which the order is random; 0: all of it. Where it lies in an object store and is larger
    than the cache, reads stay within so many samples."""
    document_mask: bool = False
    """Keep attention within a document, and count its positions from its beginning; where there are chats, always."""
    cache_gb: float = 10.0
    """Of a node's disk, for what was read from remote shards."""
    prepared_url: str = "runs/data"
    """Folder (fsspec URL) for the token shards; every node must be able to read it."""
    ledger: str = ""
    """Folder in which every worker writes down the ids of the samples that it trains on; empty for none."""

    def __post_init__(self) -> None:
        require(
            self,
            *filled(
                self,
                source="a file, a glob, a URL or python-stdlib",
                tokenizer="byte, a file or a folder",
                prepared_url="a folder",
            ),
            *no_password(self, "source", "tokenizer", "chat_template", "prepared_url", "ledger"),
            *(
                (not value or self.tokenizer != "byte", f"{key}={value!r} needs a data.tokenizer other than byte")
                for key, value in (
                    ("begin_of_document", self.begin_of_document),
                    ("end_of_document", self.end_of_document),
                )
            ),
            *within(self, "(0, 1)", "held_out_fraction"),
            *within(self, "[0, inf)", "max_bad_documents", "max_long_conversations", lowest="none"),
            *within(self, "[0, inf)", "window", lowest="all"),
            *within(self, "(0, inf)", "cache_gb"),
            *self._chat_checks(),
            *self._mixture_checks(),
        )

    @property
    def chats(self) -> bool:
        """Whether there are conversations among the sources."""
        return any(form == "chat" for form in self._formats())

    @property
    def masks_documents(self) -> bool:
        """Whether attention is kept within a document."""
        return self.document_mask or self.chats

    def _formats(self) -> list[str]:
        return [source.format for source in self.sources] or [self.format]

    def _chat_checks(self) -> Iterator[Check]:
        yield (
            self.format == "auto" or not self.sources,
            f"format={self.format} is of data.source; give each of data.sources its own",
        )
        for key in ("chat_template", "chat_date"):
            yield self.chats or not getattr(self, key), f"{key} is for conversations, and there are none (format=chat)"
        yield (
            not self.chat_date or re.fullmatch(r"\d{4}-[01]\d-[0-3]\d", self.chat_date) is not None,
            f"chat_date must be a date such as 2026-11-30, not {self.chat_date!r}",
        )
        yield (
            self.held_out != "ends" or not self.chats,
            "held_out=ends would cut conversations; take auto or documents, which keep whole ones",
        )

    def _mixture_checks(self) -> Iterator[Check]:
        names = [source.name for source in self.sources]
        yield (
            self.source == SOURCE or not names,
            f"source={self.source} would not be read beside data.sources ({', '.join(names)}); give one of these its "
            "urls, or leave data.source out",
        )
        twice = sorted({name for name in names if names.count(name) > 1})
        yield not twice, f"sources: {', '.join(twice)} is there more than once; each has a name of its own"
        steps = [stage.step for stage in self.mixture]
        yield steps == sorted(set(steps)), f"mixture: steps must rise from one to the next, not {steps}"
        for number, stage in enumerate(self.mixture):
            unknown = sorted(stage.weights.keys() - set(names))
            known = f"the sources are {', '.join(names)}" if names else "there are no data.sources"
            yield not unknown, f"mixture[{number}]: no source is called {', '.join(unknown)}; {known}"
        for where, weights in self._weights():
            try:
                shares_of(weights)
            except ValueError as error:
                yield False, f"{where}: {error}"

    def _weights(self) -> Iterator[tuple[str, list[float]]]:
        if self.sources:
            yield "sources", [source.weight for source in self.sources]
        for number, stage in enumerate(self.mixture):
            weights = self._in_order(stage.weights)
            if any(weight > 0 for weight in weights):
                yield f"mixture[{number}]", weights

    def mixtures(self, stages: Sequence[tuple[int, Mapping[str, float]]] = ()) -> list[tuple[int, tuple[int, ...]]]:
        """Return the step from which on each mixture holds, and the integer share of each source in it.

        Args:
            stages: first steps of a run's stages that have weights of their own, and these.
        """
        if not self.sources:
            return [(1, (1,))]
        found = dict(zip([1, *(one.step for one in self.mixture)], self._weights(), strict=True))
        found |= {step: (f"stage of step {step}", self._in_order(weights)) for step, weights in stages}
        return [(step, shares_of(weights)) for step, (_, weights) in sorted(found.items())]

    def _in_order(self, weights: Mapping[str, float]) -> list[float]:
        return [weights.get(source.name, 0.0) for source in self.sources]


def shares_of(weights: list[float]) -> tuple[int, ...]:
    """Return the smallest integers in the proportion of weights, each read as the decimal number that it is written as.

    Raises:
        ValueError: their sum is larger than MAX_DENOMINATOR: no mixture repeats after so few samples.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    unit = sum(exact)
    parts = [weight / unit for weight in exact]
    denominator = lcm(*(part.denominator for part in parts))
    if denominator > MAX_DENOMINATOR:
        raise ValueError(
            f"the weights {weights} have shares of no common denominator up to {MAX_DENOMINATOR:,}, so no mixture of "
            "few samples has exactly these; write them with fewer digits"
        )
    return tuple(int(part * denominator) for part in parts)
