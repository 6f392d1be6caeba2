"""Typed dataclasses out of nested values, with all that is wrong with them told at once."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, make_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optim.checks import ConfigProblems
from orchestrator.config import RunConfig
from workers.common.errors import ConfigError
from workers.config import MODELS, ModelConfig

T = TypeVar("T")
Choices = Mapping[Any, Iterable[type]]
"""Of a type that stands for several dataclasses: these, the default first; their key `name` chooses."""
ARCHITECTURES: Choices = {ModelConfig: MODELS}
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
TYPE_NAMES_IN_A_LIST = {int: "whole numbers in a list", float: "numbers in a list", str: "texts in a list"}
SWITCH = ("true", "false", "yes", "no", "on", "off", "1", "0")


def build(cls: type[T], values: dict[str, Any], what: str, choices: Choices = ARCHITECTURES) -> T:
    """Return a dataclass that is made of nested values.

    Args:
        cls: the dataclass; its fields may be others, and tuples of others.
        values: nested dicts.
        what: they are of, for messages.
        choices: of types that stand for several dataclasses.

    Raises:
        ConfigError: with every problem that was found.
    """
    builder = _Builder(cls, choices)
    result = builder.build(cls, values, "")
    refuse_all(what, builder.problems)
    assert result is not None, "what cannot be built has a problem"
    return result


def refuse_all(what: str, problems: Sequence[str]) -> None:
    """Refuse what has problems, with all of them.

    Raises:
        ConfigError: there are any.
    """
    if problems:
        told = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{what}: {len(problems)} problem(s)\n{told}")


def unknown_key(key: str, prefix: str = "") -> str:
    """Tell that a config has no such key, and which one may have been meant; empty where it has.

    Args:
        key: as `optim.lr`, or of a section.
        prefix: before it in the message: where it stands.
    """
    schema, name = _config_keys(), re.sub(r"\.\d+(?=\.|$)", "[]", key)
    by_name = any(name.startswith(f"{known}.") for known, hint in schema.items() if get_origin(hint) is dict)
    if by_name or any(known == name or known.startswith((f"{name}.", f"{name}[]")) for known in schema):
        return ""
    return f"{prefix}{key}: no such key of a config{_meant(name.removesuffix('[]'), schema)}"


def hint_of(key: str) -> Any:
    """Return the type of a key of a config; None where there is none."""
    return _config_keys().get(re.sub(r"\.\d+\.", "[].", key))


@cache
def _config_keys() -> Mapping[str, Any]:
    return _leaves(RunConfig, "", ARCHITECTURES)


class _Builder:
    """Makes a dataclass out of nested values, and gathers what is wrong with them.

    Args:
        root: the dataclass of all of them, whose keys may be meant by one that is unknown.
        choices: of types that stand for several dataclasses.
    """

    def __init__(self, root: type, choices: Choices) -> None:
        self.root, self.choices = root, choices
        self.problems: list[str] = []

    @property
    def known(self) -> dict[str, Any]:
        """The type of every key."""
        return _leaves(self.root, "", self.choices)

    def build(self, cls: type, values: dict[str, Any], prefix: str) -> Any:
        """Make `cls` out of `values`; add what is wrong to the problems and return None then."""
        hints, arguments, unusable, before = get_type_hints(cls), {}, [], len(self.problems)
        holes = False
        for key, value in values.items():
            name = f"{prefix}{key}"
            if key not in hints:
                self.problems.append(self._unknown(name, cls))
            elif item := _item(hints[key]):
                arguments[key] = self._build_all(item, value, name)
                holes |= arguments[key] is None
            elif kinds := _sections(hints[key], self.choices):
                if not isinstance(value, dict):
                    self.problems.append(f"{name}: is a section with keys of its own, not {value!r}")
                elif section := _chosen(kinds, value):
                    arguments[key] = self.build(section, value, f"{name}.")
                    holes |= arguments[key] is None
                else:
                    known = ", ".join(_default_name(kind) for kind in kinds)
                    self.problems.append(f"{name}.name: must be one of {known}, not {value['name']!r}")
            else:
                try:
                    arguments[key] = converted(hints[key], value)
                except OmegaConfBaseException:
                    self.problems.append(f"{name}: must be {_type_name(hints[key])}, not {value!r}")
                    unusable.append(key)
        required = {key.name for key in fields(cls) if key.default is MISSING and key.default_factory is MISSING}
        self.problems.extend(f"{prefix}{key}: is missing" for key in sorted(required - values.keys()))
        if required - arguments.keys() or holes:
            return None
        try:
            made = cls(**arguments)
        except ConfigProblems as error:
            # What a check says about a default in the place of an unusable value would mislead.
            sound = [problem for problem in error.problems if not any(key in problem for key in unusable)]
            self.problems.extend(f"{prefix}{problem}" for problem in sound)
            return None
        return made if len(self.problems) == before else None

    def _build_all(self, cls: type, values: Any, name: str) -> Any:
        """Make a tuple of `cls` out of a list of sections; return None where something is wrong with one."""
        if not isinstance(values, list | tuple):
            self.problems.append(f"{name}: is a list of sections, each with keys of its own, not {values!r}")
            return None
        made = []
        for number, value in enumerate(values):
            if isinstance(value, dict):
                made.append(self.build(cls, value, f"{name}[{number}]."))
            else:
                self.problems.append(f"{name}[{number}]: is a section with keys of its own, not {value!r}")
                made.append(None)
        return None if None in made else tuple(made)

    def _unknown(self, name: str, cls: type) -> str:
        """Say that `cls` has no such key, and which one may have been meant."""
        known, shown, name = self.known, name, re.sub(r"\[\d+\]", "[]", name)
        if name in known:
            section = name.rpartition(".")[0]
            return f"{shown}: unknown key where {section}.name={_default_name(cls)}"
        return f"{shown}: unknown key{_meant(name, known)}"


def _meant(name: str, known: Mapping[str, Any]) -> str:
    """Return the question which key may have been meant; empty where none is like it."""
    same_leaf = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    sections = {key.rpartition(".")[0] for key in known}
    close = difflib.get_close_matches(name, [*known, *sections], n=1, cutoff=0.9 if same_leaf else 0.5)
    meant = dict.fromkeys([*close, *same_leaf])
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def converted(hint: Any, value: Any) -> Any:
    """Return a value as its type has it.

    Raises:
        OmegaConfBaseException: it cannot be one.
    """
    if get_origin(hint) is dict and get_args(get_args(hint)[1]) and isinstance(value, dict):
        return {str(key): converted(get_args(hint)[1], one) for key, one in value.items()}
    if hint is bool and str(value).lower() not in SWITCH:
        raise OmegaConfBaseException  # It would take any number but 0 for true.
    alone = OmegaConf.structured(make_dataclass("Alone", [("value", hint)]))
    return plain(OmegaConf.merge(alone, {"value": value}).value)


def plain(value: Any) -> Any:
    """Return a value without OmegaConf's own lists and dicts."""
    if not OmegaConf.is_config(value):
        return value
    found = OmegaConf.to_container(value)
    return found if isinstance(found, dict) else tuple(found)  # type: ignore[arg-type]


def _item(hint: Any) -> type | None:
    """Return the dataclass of which a hint's list is made; None where it is no such list."""
    item = get_args(hint)[0] if get_origin(hint) is tuple else None
    return item if is_dataclass(item) else None  # type: ignore[return-value]


def _sections(hint: Any, choices: Choices) -> list[Any]:
    """Return the dataclasses that a hint stands for, the default first; where there are several, `name` chooses."""
    chosen = next((kinds for kind, kinds in choices.items() if kind is hint), None)
    return list(chosen) if chosen is not None else [hint] if is_dataclass(hint) else []


def _chosen(kinds: list[Any], values: dict[str, Any]) -> Any:
    if len(kinds) == 1 or "name" not in values:
        return kinds[0]
    return next((kind for kind in kinds if _default_name(kind) == values["name"]), None)


def _default_name(kind: type) -> str:
    return next(field.default for field in fields(kind) if field.name == "name")  # type: ignore[arg-type]


def _leaves(cls: type, prefix: str, choices: Choices) -> dict[str, Any]:
    """Return the type of every key."""
    found = {}
    for key, hint in get_type_hints(cls).items():
        kinds = _sections(hint, choices)
        for kind in kinds:
            found |= _leaves(kind, f"{prefix}{key}.", choices)
        if item := _item(hint):
            found |= _leaves(item, f"{prefix}{key}[].", choices)
        if not kinds:
            found[f"{prefix}{key}"] = hint
    return found


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("empty" if one is type(None) else _type_name(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return TYPE_NAMES_IN_A_LIST.get(get_args(hint)[0], "values in a list")
    return TYPE_NAMES.get(hint) or ("keys with values" if Any in get_args(hint) else "numbers by name")
