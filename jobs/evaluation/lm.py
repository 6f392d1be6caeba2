"""A checkpoint as lm-eval knows a language model: text in, likelihoods and greedily written text out.

Invariant: what lm-eval's own `hf` model finds of the exported checkpoint, this finds, too: the same ids, the same part
of what is too long, the same windows. Where that one ends with an assertion, this tells what the task asks for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

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
UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
"""Settings of a generation; the last two mean nothing to a greedy one."""
SHOWN = 60
"""Letters of a text in a message."""

Told = Callable[[str, int, int], object]
"""Called with what is done, how much of it, and how much there is."""


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    stops: tuple[str, ...]
    most: int
    """New tokens."""


class CheckpointLM(TemplateLM):
    """A model that lm-eval evaluates.

    Args:
        model: ready to be asked.
        tokenizer: that it was trained with.
        seq_len: tokens that it looks at.
        batch_tokens: that go through it at once, padding included.
        told: shows how far it is.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        seq_len: int,
        batch_tokens: int,
        told: Told = lambda what, done, total: None,
    ) -> None:
        super().__init__()
        self._model, self._texts, self._told = model, Texts(tokenizer), told
        self.max_length, self._batch_tokens = seq_len, batch_tokens

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
        order = sorted(range(len(prompts)), key=lambda i: (-prompts[i].most, -len(prompts[i].ids), prompts[i].ids))
        found: dict[int, str] = {}
        while len(found) < len(prompts):
            widest = max(len(prompts[i].ids) + prompts[i].most for i in order[len(found) :])
            batch = order[len(found) :][: max(1, self._batch_tokens // widest)]
            found |= zip(batch, self._written([prompts[i] for i in batch]), strict=True)
            self._told("generations", len(found), len(prompts))
        return [found[i] for i in range(len(prompts))]

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
        if unknown := asked.keys() - UNDERSTOOD - {"max_new_tokens", "max_tokens", "max_completion_tokens"}:
            raise _refused(request, f"generation_kwargs has {', '.join(sorted(unknown))}, which is not understood here")
        settings: Any = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
        if settings["do_sample"]:
            raise _refused(request, "it samples (do_sample, temperature), and generations are greedy here")
        if (most := settings["max_gen_toks"]) >= self.max_length:
            raise _refused(
                request,
                f"it asks for up to {most} new tokens, and the model looks at {self.max_length} in all; set "
                "max_gen_toks below that in the generation_kwargs of a task file of your own (--task-folder)",
            )
        ids = self.tok_encode(context)[most - self.max_length :] or [self.prefix_token_id]
        return _Prompt(ids, tuple(settings["until"]), most)

    def _written(self, prompts: Sequence[_Prompt]) -> list[str]:
        """Return what the model writes after each prompt."""
        end = self._texts.end_id
        written: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        while going:
            size = min(*(prompts[i].most - len(written[i]) for i in going), max(LOOKED_AT, len(written[going[0]])))
            texts = [[*prompts[i].ids, *written[i]] for i in going]
            more = generate(self._model, texts, max_new_tokens=size, stop=() if end is None else (end,))
            for i, new in zip(going, more, strict=True):
                written[i] += new
            going = [
                i
                for i, new in zip(going, more, strict=True)
                if len(new) == size and len(written[i]) < prompts[i].most and not self._stopped(prompts[i], written[i])
            ]
        return [
            postprocess_generated_text(self._texts.decode(ids), list(prompt.stops), None)
            for prompt, ids in zip(prompts, written, strict=True)
        ]

    def _stopped(self, prompt: _Prompt, written: list[int]) -> bool:
        text = self._texts.decode(written)
        return any(stop in text for stop in prompt.stops if stop)


def _there(token: int | None, what: str) -> int:
    if token is None:
        raise ConfigError(f"the tokenizer has no token that {what}, and a task needs one (data.end_of_document=none)")
    return token


def _refused(request: Instance, why: str) -> ConfigError:
    return ConfigError(f"task {request.task_name}, document {request.doc_id}: {why}")


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
