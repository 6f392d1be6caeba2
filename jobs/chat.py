"""`raymuon generate --chat`: a conversation with a fine-tuned model, by the chat template that it was tuned with."""

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from jobs.generate import Settings, Written, context_of, tokenizer_of, written_by
from jobs.trained import Trained
from workers.common.errors import ConfigError
from workers.data.chat import ChatError, ChatTemplate, Message
from workers.data.chat_encoder import encode, encode_prompt
from workers.data.config import DataConfig
from workers.data.json_tokenizer import FOLDER, read_template
from workers.data.tokenizer import Tokenizer
from workers.data.tokenizer_files import open_template


class Conversation:
    """What a person and a model have said to each other; all of it is read again for each answer.

    Args:
        trained: the model.
        settings: of its answers.

    Raises:
        ConfigError: it has no chat template or no tokenizer, or a setting is out of range.
        StorageError: the checkpoint is damaged.
    """

    def __init__(self, trained: Trained, settings: Settings) -> None:
        self.settings, self.sampling = settings, settings.sampling
        self.tokenizer = tokenizer_of(trained)
        self.template = template_of(trained, self.tokenizer)
        self.stop = trained.ends | ends_of_turn(self.template, self.tokenizer)
        self.trained, self.model = trained, trained.model(settings.dtype)
        self.messages: list[Message] = []

    def answer(self, text: str, say: Callable[[str], object]) -> Written:
        """Return what the model answers; `say` takes it piece by piece. What is refused was never said.

        Raises:
            ConfigError: the template refuses it, it has a special token in it, or the conversation has become too long.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            prompt = encode_prompt(self.template, self.tokenizer, messages)
        except ChatError as error:
            raise ConfigError(str(error)) from error
        context = context_of(self.trained, "the conversation", len(prompt))
        given = self.model, self.tokenizer, [prompt], [text], self.settings, self.stop, context
        (written,) = written_by(*given, lambda number, piece, done: say(piece))
        self.messages = [*messages, {"role": "assistant", "content": written.text}]
        return written


def template_of(trained: Trained, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template of the conversations that a model was tuned with, else its tokenizer's own.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    log, now = trained.log, datetime.now()
    if log is not None and (known := trained.manifest.identity.get("data.chat_template")):
        return read_template(log.store, known, now)
    if not tokenizer.sha256:
        raise ConfigError(f"{trained.where}: it was not tuned with conversations (data.format=chat); leave --chat out")
    folder = trained.where if log is None else f"{log.store.url}/{FOLDER}"
    config = DataConfig(tokenizer=folder, format="chat", chat_date=now.date().isoformat())
    try:
        return open_template(config, tokenizer, trained.s3_endpoint)
    except ConfigError as error:
        raise ConfigError(f"{trained.where}: no chat template to talk by: {error}") from error


def ends_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the special tokens that a template has the assistant end its turn with."""
    special = {tokenizer.marked_up().token_to_id(token) for token in tokenizer.special}
    with suppress(ChatError):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        turn = encode(template, tokenizer, messages)
        return frozenset(turn.ids[turn.counts].tolist()) & special
    return frozenset()
