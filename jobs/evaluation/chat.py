"""What lm-eval asks as a conversation, written by the template that a model was tuned with.

Invariant: the text is that of lm-eval's own `hf` model and transformers under the same template. So a system message
that the template refuses is left out, and a begun answer goes on where its text ends.
"""

from collections.abc import Sequence
from typing import Any

from workers.common.errors import ConfigError
from workers.data.chat import ChatError, ChatTemplate, Message

HERE = "\ufdd0"
"""Stands where a begun answer ends: one of Unicode's noncharacters, which no text has."""


class Conversations:
    """Writes conversations.

    Args:
        template: of the model.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.left_out = 0
        """System messages that the template refuses."""

    @property
    def about(self) -> dict[str, Any]:
        """What decides on the texts, and what was left out of them."""
        return {"template_sha256": self.template.sha256, "system_messages_left_out": self.left_out}

    def text(self, messages: Sequence[Message], to_answer: bool) -> str:
        """Return a conversation as text.

        Args:
            messages: each with a `role` and a `content`.
            to_answer: the assistant is to answer; else its last message is begun, and goes on.

        Raises:
            ConfigError: the template fails.
        """
        write = self._asked if to_answer else self._begun
        try:
            return write(messages)
        except ChatError as error:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) == len(messages):
                raise ConfigError(str(error)) from error
            return self._without_system(others, to_answer)

    def _without_system(self, messages: Sequence[Message], to_answer: bool) -> str:
        text = self.text(messages, to_answer)
        self.left_out += 1
        return text

    def _asked(self, messages: Sequence[Message]) -> str:
        return self.template.render(messages, add_generation_prompt=True)

    def _begun(self, messages: Sequence[Message]) -> str:
        """Return the text up to the end of the last message; without white space there if the template strips it."""
        last = messages[-1]
        text = self.template.render([*messages[:-1], {**last, "content": f"{last['content']}{HERE} "}])
        begun, here, after = text.rpartition(HERE)
        if not here:
            raise ChatError("the chat template does not write what the assistant has begun to say")
        return begun if after.startswith(" ") else begun.rstrip()


def refuses_system(template: ChatTemplate) -> bool:
    """Tell whether a template can write a conversation, and none with a system message."""
    user = {"role": "user", "content": "a"}
    try:
        template.render([{"role": "system", "content": "a"}, user], add_generation_prompt=True)
    except ChatError:
        return True
    return False
