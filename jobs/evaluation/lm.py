"""A checkpoint as lm-eval knows a language model: text in, likelihoods and greedily written text out.

Invariant: what lm-eval's own `hf` model finds of the exported checkpoint, this finds, too: the same ids, the same part
of what is too long, the same windows. Where that one ends with an assertion, this tells what the task asks for.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jobs.evaluation.chat import Conversations
from jobs.evaluation.texts import Texts
from workers.common.errors import ConfigError
from workers.data.tokenizer import Tokenizer
from workers.generate import generate
from workers.models import LanguageModel
from workers.scoring import Pair, score

MAX_NEW_TOKENS = 256
"""Of a generation whose task says nothing (lm-eval's `max_gen_toks`)."""
LOOKED_AT = 32
"""New tokens after which a generation is looked at for the strings that end it; then after twice as many."""
LENGTHS = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
UNDERSTOOD = LENGTHS | {"until", "do_sample", "temperature", "top_p", "top_k"}
"""Settings of a generation; the last two mean nothing to a greedy one."""
SHOWN = 60
"""Letters of a text in a message."""

Told = Callable[[str, int, int], object]
"""Called with what is done, how much of it, and how much there is."""


@dataclass(frozen=True)
class Writing:
    """How a task has a text go on."""

    stops: tuple[str, ...]
    """Strings that end it, and are no part of it."""
    most: int
    """New tokens."""


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    writing: Writing
    ends: tuple[int, ...]
    """Tokens that end what is written, rising."""

    @property
    def room(self) -> int:
        """Tokens with all that may be written."""
        return len(self.ids) + self.writing.most


class CheckpointLM(TemplateLM):
    """A model that lm-eval evaluates.

    Args:
        model: ready to be asked.
        tokenizer: that it was trained with.
        seq_len: tokens that it looks at.
        batch_tokens: that go through it at once, padding included.
        told: shows how far it is.
        ends: tokens with which it ends a text, besides the tokenizer's own.
        chat: writes conversations, where tasks are to ask in them.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        seq_len: int,
        batch_tokens: int,
        told: Told = lambda what, done, total: None,
        ends: Collection[int] = (),
        chat: Conversations | None = None,
    ) -> None:
        super().__init__()
        self._model, self._texts, self._told, self.chat = model, Texts(tokenizer), told, chat
        self.max_length, self._batch_tokens = seq_len, batch_tokens
        own = () if self._texts.end_id is None else (self._texts.end_id,)
        self._ends = frozenset((*ends, *own))

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a document."""
        return _there(self._texts.end_id, "ends a document")

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that stands before a text with no context."""
        return _there(self._texts.prefix_id, "begins or ends a document, to stand before a text without a context")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text."""
        return self._texts.encode(string, add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval would keep requests; none are kept."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, up to where the assistant is to answer or to go on.

        Raises:
            ConfigError: the template fails.
        """
        assert self.chat is not None
        return self.chat.text(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation after its context, in nats, and whether it is the greedy one.

        Raises:
            ConfigError: a continuation has no token of its own, or more than the model looks at.
        """
        pairs = [self._pair(one) for one in requests]
        return self._scores(pairs, "continuations")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in nats; each window has as much context as there is room for.

        Raises:
            ConfigError: the tokenizer has no token to begin with.
        """
        windows = [self._windows(one.args[0]) for one in requests]
        scores = iter(self._scores([window for one in windows for window in one], "windows of text"))
        return [sum(next(scores)[0] for _ in one) for one in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, greedily, up to the strings that end it.

        Raises:
            ConfigError: a task asks for more tokens than the model looks at, or for something that is not greedy.
        """
        prompts = [self._prompt(one) for one in requests]
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].ends, -prompts[i].room, prompts[i].ids))
        found: dict[int, str] = {}
        for _, alike in groupby(order, key=lambda i: prompts[i].ends):
            for batch in self._batches(list(alike), prompts):
                found |= zip(batch, self._written([prompts[i] for i in batch]), strict=True)
                self._told("generations", len(found), len(prompts))
        return [found[i] for i in range(len(prompts))]

    def _batches(self, numbers: list[int], prompts: Sequence[_Prompt]) -> Iterator[list[int]]:
        """Yield numbers of prompts, the one with most room first, as many as go through the model at once."""
        while numbers:
            size = max(1, self._batch_tokens // prompts[numbers[0]].room)
            yield numbers[:size]
            numbers = numbers[size:]

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests], "continuations")

    def _scores(self, pairs: Sequence[Pair], what: str) -> list[tuple[float, bool]]:
        def told(done: int) -> None:
            self._told(what, done, len(pairs))

        return score(self._model, pairs, self.max_length, self._batch_tokens, told)

    def _pair(self, request: Instance) -> Pair:
        context, continuation = request.arguments
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == [self.prefix_token_id]:
                before, after = after[:1], after[1:]
        if not after:
            raise _refused(request, f"{_short(continuation)} has no token of its own after its context")
        if len(after) > self.max_length:
            raise _refused(
                request, f"{_short(continuation)} has {len(after)} tokens, and the model looks at {self.max_length}"
            )
        return before or [self.prefix_token_id], after

    def _windows(self, text: str) -> list[Pair]:
        ids = self.tok_encode(text)
        return [
            make_disjoint_window(window)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        ]

    def _prompt(self, request: Instance) -> _Prompt:
        context, asked = request.arguments
        writing = writing_of(asked, self.max_length, f"task {request.task_name}")
        ids = self.tok_encode(context)[writing.most - self.max_length :] or [self.prefix_token_id]
        # A special token is in no text that is looked at: as a stop it is a token.
        ends = self._ends | {token for stop in writing.stops if (token := self._texts.special_id(stop)) is not None}
        return _Prompt(ids, writing, tuple(sorted(ends)))

    def _written(self, prompts: Sequence[_Prompt]) -> list[str]:
        """Return what the model writes after each prompt; the same tokens end all of them."""
        ends = prompts[0].ends
        written: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        while going:
            size = min(*(self._left(prompts[i], written[i]) for i in going), max(LOOKED_AT, len(written[going[0]])))
            texts = [[*prompts[i].ids, *written[i]] for i in going]
            more = generate(self._model, texts, max_new_tokens=size, stop=ends)
            for i, new in zip(going, more, strict=True):
                written[i] += new
            whole = [i for i, new in zip(going, more, strict=True) if len(new) == size]
            going = [
                i for i in whole if self._left(prompts[i], written[i]) and not self._stopped(prompts[i], written[i])
            ]
        return [self._text(prompt, ids) for prompt, ids in zip(prompts, written, strict=True)]

    def _left(self, prompt: _Prompt, written: list[int]) -> int:
        return prompt.writing.most - len(written)

    def _stopped(self, prompt: _Prompt, written: list[int]) -> bool:
        text = self._texts.decode(written)
        return any(stop in text for stop in self._stops(prompt))

    def _text(self, prompt: _Prompt, written: list[int]) -> str:
        return postprocess_generated_text(self._texts.decode(written), self._stops(prompt), None)

    def _stops(self, prompt: _Prompt) -> list[str]:
        return [stop for stop in (*prompt.writing.stops, self._texts.end) if stop]


def writing_of(asked: Mapping[str, Any], max_length: int, who: str) -> Writing:
    """Return what a task's `generation_kwargs` ask for.

    Args:
        asked: the settings.
        max_length: tokens that the model looks at.
        who: asks, for messages.

    Raises:
        ConfigError: it is more than the model looks at, not greedy, or something that is not understood.
    """
    if unknown := sorted(key for key in asked if key not in UNDERSTOOD and (key, asked[key]) != ("num_beams", 1)):
        raise ConfigError(f"{who}: generation_kwargs has {', '.join(unknown)}, which is not understood here")
    try:
        settings: Any = normalize_gen_kwargs({**asked, "until": asked.get("until") or []}, MAX_NEW_TOKENS)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{who}: generation_kwargs cannot be understood: {error}") from error
    if settings["do_sample"]:
        raise ConfigError(f"{who}: it samples (do_sample, temperature), and generations are greedy here")
    if (most := settings["max_gen_toks"]) >= max_length:
        raise ConfigError(
            f"{who}: it asks for up to {most} new tokens, and the model looks at {max_length} in all; set max_gen_toks "
            "below that in the generation_kwargs of a task file of your own (--task-folder)"
        )
    return Writing(tuple(settings["until"]), most)


def _there(token: int | None, what: str) -> int:
    if token is None:
        raise ConfigError(f"the tokenizer has no token that {what}, and a task needs one (data.end_of_document=none)")
    return token


def _refused(request: Instance, why: str) -> ConfigError:
    return ConfigError(f"task {request.task_name}, document {request.doc_id}: {why}")


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
