"""`raymuon generate`: what a trained model writes after a prompt."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jobs.trained import Dtype, Trained
from workers.common.errors import ConfigError
from workers.data.text_stream import TextStream
from workers.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from workers.generate import Sampling
    from workers.models import LanguageModel


@dataclass(frozen=True)
class Settings:
    """How is written."""

    tokens: int = 200
    """After each prompt, at most."""
    temperature: float = 0.0
    """0: the likeliest token each time."""
    top_p: float = 1.0
    """Share of the probability that the tokens have together of which one is drawn."""
    seed: int = 0
    cache: bool = True
    """Of keys and values, or latents."""
    dtype: Dtype = "auto"

    @property
    def sampling(self) -> "Sampling":
        """How tokens are chosen.

        Raises:
            ConfigError: temperature or top-p is out of range.
        """
        from workers.generate import Sampling  # Imports torch.

        return Sampling(self.temperature, self.top_p)


@dataclass
class Written:
    """What the model has written after a prompt."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    """By the model itself, with the end of the document."""


def write(
    trained: Trained, prompts: Sequence[str], settings: Settings, say: Callable[[str], object] = lambda text: None
) -> list[Written]:
    """Return what the model writes after each prompt, as after the beginning of a document.

    Args:
        trained: the model.
        prompts: are written to at the same time.
        settings: how.
        say: takes the prompts and their texts, piece by piece as they come, one prompt's after the other's.

    Raises:
        ConfigError: a setting is out of range, a prompt has no tokens or more than the model was trained to look at, or
            there is no tokenizer.
        StorageError: the checkpoint is damaged.
        TrainingError: the model's logits are not finite.
    """
    from workers.generate import begun  # Imports torch.

    _ = settings.sampling  # Refused before the weights are read.
    tokenizer = tokenizer_of(trained)
    ids = [begun(tokenizer, prompt) for prompt in prompts]
    longest = max(range(len(ids)), key=lambda number: len(ids[number]))
    context = context_of(trained, f"prompt {longest + 1}", len(ids[longest]))
    turns = Turns(prompts, say)
    model = trained.model(settings.dtype)
    return written_by(model, tokenizer, ids, prompts, settings, trained.ends, context, turns.add)


def written_by(
    model: "LanguageModel",
    tokenizer: Tokenizer,
    ids: Sequence[Sequence[int]],
    prompts: Sequence[str],
    settings: Settings,
    stop: Collection[int],
    context: int,
    tell: Callable[[int, str, bool], object],
) -> list[Written]:
    """Return what a model writes after each prompt.

    Args:
        model: of which.
        tokenizer: its own.
        ids: the prompts as tokens.
        prompts: as text.
        settings: how.
        stop: tokens that end a text.
        context: tokens that the model looks back on.
        tell: takes the number of a prompt, what has been added to its text, often nothing, and whether that is all.
    """
    from workers.generate import stream

    written, texts = [Written(prompt) for prompt in prompts], [TextStream(tokenizer) for _ in prompts]
    given = settings.tokens, stop, settings.sampling, settings.seed, settings.cache, context
    for number, token in stream(model, ids, *given):
        one = written[number]
        if token is None:
            one.ended = len(one.tokens) < settings.tokens
            piece = texts[number].rest()
        else:
            one.tokens.append(token)
            piece = texts[number].add(token)
        one.text += piece
        tell(number, piece, token is None)
    return written


def tokenizer_of(trained: Trained) -> Tokenizer:
    """Return the model's tokenizer.

    Raises:
        ConfigError: it came without.
    """
    if trained.tokenizer is None:
        raise ConfigError(
            f"{trained.where}: it came without a tokenizer, so there is no text for it; put the original's "
            "tokenizer.json into the Hugging Face folder (and import it once more)"
        )
    return trained.tokenizer


def context_of(trained: Trained, what: str, tokens: int) -> int:
    """Return how many tokens the model was trained to look at.

    Raises:
        ConfigError: a text has more.
    """
    if tokens > trained.seq_len:
        raise ConfigError(
            f"{what} has {tokens} tokens, and {trained.where} was trained to look back on {trained.seq_len}; shorten it"
        )
    return trained.seq_len


class Turns:
    """Lets several texts that grow at the same time be said one after the other: the first that is not done, at once.

    Args:
        begins: what each begins with.
        say: takes pieces.
    """

    def __init__(self, begins: Sequence[str], say: Callable[[str], object]) -> None:
        self._say = say
        self._waiting, self._done = list(begins), [False] * len(begins)
        self._turn = 0
        self._speak()

    def add(self, number: int, piece: str, done: bool) -> None:
        """Take a piece of a text, and whether it is the last."""
        self._waiting[number] += piece
        self._done[number] |= done
        self._speak()

    def _speak(self) -> None:
        while self._turn < len(self._waiting):
            text, self._waiting[self._turn] = self._waiting[self._turn], ""
            if text:
                self._say(text)
            if not self._done[self._turn]:
                return
            self._say("\n")
            self._turn += 1
