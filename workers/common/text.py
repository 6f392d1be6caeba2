"""Text for people: what a model, a file's name or another program's message holds must not steer their terminal."""

import re

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and newline, marks that turn the direction of writing (all of Unicode's
Bidi_Control), and halves of characters."""


def visible(text: str) -> str:
    r"""Return a text with what steers a terminal, or cannot be written, as escapes: `\x1b` for Escape."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def kind_of(value: object) -> str:
    """Return what a value of JSON, or out of a table, is to a person."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return (kinds | dict.fromkeys((int, float), "a number")).get(type(value), f"of type {type(value).__name__}")
