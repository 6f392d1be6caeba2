"""JSON values as what a dataclass says of its fields: for whatever comes from another process or another version."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_fields(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the dataclass `kind` with fields out of a JSON object; those that it does not have are left out.

    Raises:
        ValueError: a field is missing, or is not what its annotation says.
    """
    found, hints = {}, _hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            try:
                found[field.name] = read_value(hints[field.name], values[field.name])
            except ValueError as error:
                raise ValueError(f"{field.name}: {error}") from None
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{field.name} is missing")
    return kind(**found)


def read_value(kind: Any, value: Any) -> Any:
    """Return a JSON value as an annotation says: lists become tuples where it says so.

    A literal may be any value of its type: another version may know more of them.

    Raises:
        ValueError: it is something else.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        kind = type(arguments[0])
    if kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    if origin is UnionType:
        (kind,) = (one for one in arguments if one is not NoneType)
        return None if value is None else read_value(kind, value)
    if origin is dict and isinstance(value, dict):
        return {key: read_value(arguments[1], one) for key, one in value.items()}
    if origin is list and isinstance(value, list):
        return [read_value(arguments[0], one) for one in value]
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(map(read_value, repeat(arguments[0]), value))
        if len(arguments) == len(value):
            return tuple(map(read_value, arguments, value))
    raise ValueError(f"{value!r:.80} is no {kind.__name__ if isinstance(kind, type) else kind}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
