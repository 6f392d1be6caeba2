"""Conversations become token ids, and which of these are the assistant's.

Special tokens are what they stand for where the template has written them. In what somebody says they would end a turn,
or begin one: such a conversation is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workers.data.chat import ChatError, ChatTemplate, Message
from workers.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens."""

    ids: np.ndarray
    """uint32."""
    counts: np.ndarray
    """Which of them the assistant has said, so that they are learned; bool."""
    said_bytes: int
    """Of the text that the assistant has said, in UTF-8."""


def encode(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
    """Return a conversation as tokens.

    Raises:
        ChatError: the template refuses it or does not tell the assistant's turns, or there is nothing to learn in it.
    """
    _refuse_special(tokenizer, messages)
    written = template.rendered(messages, tokenizer.special)
    found = tokenizer.marked_up().encode(written.text, add_special_tokens=False)
    counts = np.zeros(len(found.ids), bool)
    begins, ends = np.array(found.offsets, np.int64).reshape(-1, 2).T
    for start, end in written.spans:
        counts |= (begins < end) & (np.maximum(ends, begins + 1) > start)
    if not counts[1:].any():  # The first token is nobody's target.
        raise ChatError("the chat template writes nothing that the assistant says, so there is nothing to learn from")
    said = sum(len(written.text[start:end].encode()) for start, end in written.spans)
    return Encoded(np.array(found.ids, np.uint32), counts, said)


def encode_prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a conversation up to where the assistant is to answer.

    Raises:
        ChatError: the template refuses it.
    """
    _refuse_special(tokenizer, messages)
    return tokenizer.marked_up().encode(template.render(messages, True), add_special_tokens=False).ids


def _refuse_special(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages):
        said = [*_texts(message)]
        if special := next((token for token in tokenizer.special if any(token in text for text in said)), None):
            raise ChatError(
                f"messages[{number}] has {special!r} in it, which is a special token of the tokenizer: the model could "
                "not tell it from the template's own"
            )


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a message: a template may write any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)
