"""Text from a trained model, token by token: greedy or drawn, of several prompts at once, with a cache or without.

Invariant: what follows a prompt is a function of the model, the prompt and the settings. It depends on no other prompt
beside it, on no cache and on no order, but for rounding, which decides between two tokens that are as likely.
"""

import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.common.errors import ConfigError, TrainingError
from workers.data.tokenizer import Tokenizer
from workers.models import LanguageModel
from workers.models.cache import KeyValueCache

SAMPLE_TEMPERATURE = 0.7
"""Of the sample at the end of a training."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.0
    """Of the softmax; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Tokens are drawn from the fewest likeliest ones that have this probability together (nucleus sampling, arXiv
    1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be a finite number of 0 (greedy) or more, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p must be above 0 and at most 1, not {self.top_p:g}")

    def choose(self, logits: Tensor, random: torch.Generator) -> int:
        """Return a token.

        Args:
            logits: `[vocabulary]`, on the CPU.
            random: moved on by one number for each token that is drawn.

        Raises:
            TrainingError: a logit is NaN or infinite.
        """
        if not logits.isfinite().all():
            raise TrainingError("the model's logits are not finite; take an earlier checkpoint")
        if not self.temperature:
            return int(logits.argmax())
        # In fp64: 10^5 probabilities are summed up.
        tokens, likely = None, ((logits.double() - logits.max()) / self.temperature).softmax(-1)
        if self.top_p < 1:
            likely, tokens = likely.sort(descending=True, stable=True)
            likely = likely[likely.cumsum(-1) - likely < self.top_p]  # Before what comes after there is enough already.
        sums = likely.cumsum(-1)
        drawn = torch.rand((), generator=random, dtype=torch.float64) * sums[-1]
        place = min(int(torch.searchsorted(sums, drawn, right=True)), len(sums) - 1)
        return place if tokens is None else int(tokens[place])


class _Text:
    """What is being written after one prompt."""

    def __init__(self, number: int, prompt: Sequence[int], seed: int) -> None:
        self.number, self.seen, self.written = number, list(prompt), 0
        self.random = torch.Generator().manual_seed(seed)

    def look_back(self, context: int | None) -> None:
        """Forget what is too far away; half of the context, so that not every token costs reading all of it anew."""
        if self.overfull(context):
            self.seen = self.seen[-max(1, (context or 0) // 2) :]

    def overfull(self, context: int | None) -> bool:
        return context is not None and len(self.seen) > context

    def add(self, token: int) -> None:
        self.seen.append(token)
        self.written += 1


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    cache: bool = True,
    context: int | None = None,
) -> Generator[tuple[int, int | None], None, None]:
    """Yield the number of a prompt and its next token, as they come; None after its last one.

    Args:
        model: on any device, in training or not; it is left as it was, and what it counts in training is not touched.
        prompts: tokens, at least one each.
        max_new_tokens: after each prompt, at most.
        stop: tokens that end a text, and are no part of it.
        sampling: how tokens are chosen.
        seed: of what is drawn, for every prompt the same.
        cache: keep keys and values of what was read; without, all is read again for every token.
        context: tokens that the model looks back on; where a text has more, it goes on from the last half as many.
            None: all.

    Raises:
        ConfigError: a prompt is empty, or has a token that the model does not know.
        TrainingError: logits are not finite.
    """
    _check(prompts, len(model.head))
    texts = [_Text(number, prompt, seed) for number, prompt in enumerate(prompts)]
    kept: KeyValueCache | None = None
    if max_new_tokens < 1:
        yield from ((text.number, None) for text in texts)
        return
    with _asked(model):
        while texts:
            if kept is None or any(text.overfull(context) for text in texts):
                for text in texts:
                    text.look_back(context)
                kept = _room(model, texts, max_new_tokens, context) if cache else None
                logits = _read(model, [text.seen for text in texts], kept)
            else:
                logits = _read(model, [text.seen[-1:] for text in texts], kept)
            going = []
            for row, text in enumerate(texts):
                token = sampling.choose(logits[row], text.random)
                if token not in stop:
                    text.add(token)
                    yield text.number, token
                if token in stop or text.written == max_new_tokens:
                    yield text.number, None
                else:
                    going.append(row)
            if kept is not None and 0 < len(going) < len(texts):
                kept.keep(going)
            texts = [texts[row] for row in going]


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cache: bool = True,
    context: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt, without the one that ended it.

    The arguments are those of `stream` and `Sampling`; `progress` is called after every token.
    """
    written: list[list[int]] = [[] for _ in prompts]
    sampling = Sampling(temperature, top_p)
    for number, token in stream(model, prompts, max_new_tokens, stop, sampling, seed, cache, context):
        if token is not None:
            written[number].append(token)
        progress()
    return written


def write_sample(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    size: int,
    context: int,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> str:
    """Return the prompt and what the model writes after it, until it ends the document.

    Args:
        model: on any device.
        tokenizer: that it was trained with.
        prompt: text to go on from.
        size: so many letters are written, or as many tokens.
        context: tokens that the model looks back on.
        seed: of the sampling.
        progress: called before each token.
    """
    tokens, written = begun(tokenizer, prompt), []
    if not tokens:
        return prompt
    stop = () if tokenizer.end is None else (tokenizer.end,)
    with closing(stream(model, [tokens], size, stop, Sampling(SAMPLE_TEMPERATURE), seed, context=context)) as coming:
        while len(tokenizer.decode(written)) < size:
            progress()
            _, token = next(coming)
            if token is None:
                break
            written.append(token)
    return tokenizer.decode(tokens + written)


def begun(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a text's tokens as those of a document's beginning."""
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    return begin + tokenizer.encode([text.encode()])[0].tolist()


def _check(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ConfigError(f"prompt {number} is empty, and the tokenizer has no token that begins a document")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ConfigError(
                f"prompt {number} has a token {max(prompt)}, and the model knows tokens up to {vocabulary - 1}; is it "
                "another tokenizer than it was trained with?"
            )


@contextmanager
def _asked(model: LanguageModel) -> Iterator[None]:
    """Have a model not train for a while: it counts and watches nothing then."""
    trains = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(trains)


def _room(model: LanguageModel, texts: list[_Text], max_new_tokens: int, context: int | None) -> KeyValueCache:
    longest = max(len(text.seen) + max_new_tokens - text.written for text in texts)
    return KeyValueCache(len(texts), longest if context is None else min(longest, context), model.head.device)


def _read(model: LanguageModel, rows: list[list[int]], cache: KeyValueCache | None) -> Tensor:
    """Return the logits behind the last token of each row, fp32 `[rows, vocabulary]` on the CPU."""
    counts, device = [len(row) for row in rows], model.head.device
    padded = torch.tensor([row + [0] * (max(counts) - len(row)) for row in rows], device=device)
    if cache is not None:
        cache.expect(counts)
    hidden = model(padded, cache=cache)
    last = hidden[torch.arange(len(rows), device=device), torch.tensor(counts, device=device) - 1]
    return F.linear(last, model.head).float().cpu()
