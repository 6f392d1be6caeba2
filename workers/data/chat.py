"""Conversations become text by a chat template, and which of it the assistant has said.

A template is Jinja with the helpers that transformers gives one, and stands for itself: the special tokens that it
names are put down at its beginning (`bound`), so that its text alone says what comes out, here, in a run's folder and
in an export. It is somebody else's program, so it runs in Jinja's sandbox.

What the assistant has said is what stands within `{% generation %}`. A template without that is asked twice for
each turn: for the conversation before it with the prompt to answer, and for that up to its end. What lies between is
the turn. Where these are not how the whole begins, nobody can tell the turns, and the conversation is refused.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import islice
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workers.common.text import kind_of

ROLES = ("system", "user", "assistant", "tool")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Special tokens, as tokenizer_config.json and templates name them."""
PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
{{- '' if loop.first else '\\n\\n' }}{{ message.role | capitalize }}:{{ '\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else %}
{{- message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '\\n\\n' }}Assistant:{{ '\\n' }}
{%- endif %}
"""
"""The built-in template: roles as text, and the end of a document after each of the assistant's turns."""
_UNDEFINED = "undefined_token"
_BEGINS, _ENDS = "generation_begins", "generation_ends"
_MARKS = range(0xFDD0, 0x110000)
"""The first are Unicode's noncharacters, which hardly a text has; no text has all."""

Message = Mapping[str, Any]


class ChatError(Exception):
    """Why a conversation, or every one, cannot be written by a template; for people."""


@dataclass(frozen=True)
class Rendered:
    """A conversation, written."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """First character and the one after the last of what the assistant has said, rising."""


class ChatTemplate:
    """A chat template.

    Args:
        source: its text, as Jinja has it.
        now: what `strftime_now` tells; None: a template that asks for the time fails, for its tokens would be others
            each day.

    Raises:
        ChatError: it is no template.
    """

    def __init__(self, source: str, now: datetime | None = None) -> None:
        self.source, self.now = source, now
        _ = self._template

    @property
    def sha256(self) -> str:
        """Of its text."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def identity(self) -> tuple[str, str]:
        """What decides on what it writes."""
        return self.sha256, self.now.isoformat() if self.now else ""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as text."""
        return ChatTemplate, (self.source, self.now)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return a conversation as text.

        Args:
            messages: each with a `role` and a `content`.
            add_generation_prompt: with what comes before the assistant's next turn.

        Raises:
            ChatError: the template fails, or refuses the conversation.
        """
        return self._render(messages, add_generation_prompt, "", "")

    def rendered(self, messages: Sequence[Message], special: Sequence[str] = ()) -> Rendered:
        """Return a conversation as text, and where the assistant speaks in it.

        Args:
            messages: each with a `role` and a `content`.
            special: tokens with which turns may end; white space after one is not the assistant's.

        Raises:
            ChatError: the template fails, or does not tell where the assistant speaks.
        """
        text = self.render(messages)
        spans = self._marked(messages, text) if self._marks else self._between(messages, text, special)
        return Rendered(text, tuple((start, end) for start, end in spans if end > start))

    @cached_property
    def _template(self) -> Template:
        try:
            return _environment(self.now).from_string(self.source)
        except TemplateError as error:
            raise ChatError(f"it is no Jinja template: {_said(error)}") from error

    @cached_property
    def _marks(self) -> bool:
        parsed = _environment(None).parse(self.source)
        return any(name.name == _BEGINS for name in parsed.find_all(nodes.Name))

    def _render(self, messages: Sequence[Message], prompt: bool, begins: str, ends: str) -> str:
        given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        try:
            return self._template.render(add_generation_prompt=prompt, **given, **{_BEGINS: begins, _ENDS: ends})
        except ChatError:
            raise
        except Exception as error:  # Of whatever a template does with what it was not made for.
            raise ChatError(f"the chat template fails: {_said(error)}") from error

    def _marked(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Return what stands within `{% generation %}`."""
        begins, ends = islice((mark for mark in map(chr, _MARKS) if mark not in text), 2)
        parts, spans, start, length = [], [], 0, 0
        for part in re.split(f"([{begins}{ends}])", self._render(messages, False, begins, ends)):
            if part == begins:
                start = length
            elif part == ends:
                spans.append((start, length))
            else:
                parts.append(part)
                length += len(part)
        if "".join(parts) != text:
            raise ChatError("the chat template changes what stands within {% generation %} after that")
        return spans

    def _between(self, messages: Sequence[Message], text: str, special: Sequence[str]) -> list[tuple[int, int]]:
        """Return what comes after the prompt to answer, turn by turn."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before, whole = self.render(messages[:number], True), self.render(messages[: number + 1])
            except ChatError as error:
                raise ChatError(
                    f"{error}, where it is to write the messages before messages[{number}] alone, by which that turn "
                    "would be found; put {% generation %} into it"
                ) from error
            if not (whole.startswith(before) and text.startswith(whole)):
                raise ChatError(
                    f"the chat template does not tell where the assistant speaks in messages[{number}]: it has no "
                    "{% generation %}, and what it writes of the messages up to that one, with the prompt to answer "
                    "before it, is not how it begins the whole conversation; put {% generation %} into it"
                )
            said = whole[len(before) :].rstrip()
            ended = any(said.endswith(token) for token in special)
            spans.append((len(before), len(before) + len(said) if ended else len(whole)))
        return spans


def bound(source: str, special: Mapping[str, str]) -> str:
    """Return a template that has the special tokens that it names in it, and writes the same with any tokenizer.

    Args:
        source: its text.
        special: tokens by their names in SPECIAL; those that are missing are undefined in the template.

    Raises:
        ChatError: it is no template.
    """
    try:
        names = meta.find_undeclared_variables(_environment(None).parse(source))
    except TemplateError as error:
        raise ChatError(f"it is no Jinja template: {_said(error)}") from error
    named = [name for name in SPECIAL if name in names]
    values = [json.dumps(special[name], ensure_ascii=False) if name in special else _UNDEFINED for name in named]
    # A line of its own: Jinja takes the line break after a block away, and the template begins as it did.
    lines = [f"{{% set {name} = {value} %}}\n" for name, value in zip(named, values, strict=True)]
    return "".join(lines) + source


class _Generation(Extension):
    """`{% generation %}`: writes marks around what it has within, which are nothing where nobody asks for them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.Name(name, "load")]) for name in (_BEGINS, _ENDS)]
        return nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)


def _environment(now: datetime | None) -> ImmutableSandboxedEnvironment:
    """Return what transformers runs templates in."""
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])

    def raise_exception(message: str) -> None:
        raise ChatError(f"the chat template refuses it: {message}")

    def strftime_now(form: str) -> str:
        if now is None:
            raise ChatError(
                "the chat template asks for today's date, with which its tokens would be others each day; set "
                "data.chat_date to the date that it is to write"
            )
        return now.strftime(form)

    found.filters["tojson"] = _to_json
    found.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return found


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON; Jinja's own filter is for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _said(error: Exception) -> str:
    line = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""  # type: ignore[attr-defined]
    return f"{' '.join(str(error).split()) or type(error).__name__}{line}"


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation, without what is null.

    Raises:
        ChatError: it is no list of messages, or the assistant says nothing in it.
    """
    if not isinstance(value, list) or not value:
        raise ChatError(f"{'an empty list' if value == [] else kind_of(value)}, not a list of messages")
    messages = [_message(number, message) for number, message in enumerate(value)]
    if all(message["role"] != "assistant" for message in messages):
        raise ChatError("no message is the assistant's, so there is nothing to learn from")
    return messages


def _message(number: int, message: Any) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, dict):
        raise ChatError(f"{where} is {kind_of(message)}, not an object with role and content")
    message = {str(key): value for key, value in message.items() if value is not None}
    if (role := message.get("role")) not in ROLES:
        said = f"role {role!r}" if "role" in message else "no role"
        raise ChatError(f"{where} has {said}; it must be one of {', '.join(ROLES)}")
    if not isinstance(content := message.get("content"), str):
        said = f"a content that is {kind_of(content)}, not a text" if "content" in message else "no content"
        raise ChatError(f"{where} has {said}")
    if "\0" in content:
        raise ChatError(f"{where} has a zero byte in its content")
    if not content.strip() and role == "assistant":
        raise ChatError(f"{where} is the assistant's, and empty")
    return message


def written(value: Any) -> bytes:
    """Return a conversation, as a row has it, as a document's bytes, which `read` gives back.

    Raises:
        ChatError: it is none, or something in it is no text.
    """
    try:
        return json.dumps(messages_of(value), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ChatError(f"half a character (\\u{ord(error.object[error.start]):04x}) is in it") from None
    except TypeError as error:
        raise ChatError(f"something in it is no text ({error})") from None


def read(document: bytes) -> list[dict[str, Any]]:
    """Return the conversation in a document."""
    return json.loads(document)
