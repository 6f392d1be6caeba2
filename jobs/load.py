"""YAML and `key=value` overrides into one typed RunConfig: the only place that knows OmegaConf.

All problems of a config are gathered and told at once.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass, make_dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from optim.checks import ConfigProblems
from orchestrator.config import RunConfig
from workers.common.errors import ConfigError
from workers.config import MODELS, ModelConfig

CONFIGS = Path(__file__).parent / "configs"
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
SWITCH = ("true", "false", "yes", "no", "on", "off", "1", "0")


def load(config: str, overrides: list[str]) -> RunConfig:
    """Return the RunConfig of a YAML file (or a built-in one, by its name) with the overrides on top.

    Raises:
        ConfigError: with every problem that was found.
    """
    return load_values(_read(config), overrides, config)


def load_values(values: Any, overrides: list[str], name: str) -> RunConfig:
    """Return the RunConfig of nested values, as a run has put them down, with the overrides on top.

    Args:
        values: nested dicts, or what OmegaConf has made of them.
        overrides: `key=value`.
        name: of the config, for messages.

    Raises:
        ConfigError: with every problem that was found.
    """
    problems: list[str] = []
    result = _build(RunConfig, _merge(values, overrides, name), "", problems)
    if problems or result is None:
        raise ConfigError(f"config {name}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
    return result


def documented_yaml(config: RunConfig) -> str:
    """Return the config as YAML with every key's documentation above it."""
    lines = []
    for section in fields(config):
        value = getattr(config, section.name)
        lines.append(f"# {_docs(RunConfig)[section.name]}")
        if not is_dataclass(value):
            lines.append(_yaml(section.name, value))
            continue
        lines.append(f"{section.name}:")
        for key in fields(value):
            lines.append(f"  # {_docs(type(value))[key.name]}")
            lines.append(indent(_yaml(key.name, getattr(value, key.name)), "  "))
    return "\n".join(lines)


def plain_yaml(config: RunConfig) -> str:
    """Return the resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def _read(config: str) -> Any:
    path = Path(config)
    if not path.is_file() and path.name == config and (CONFIGS / f"{config}.yaml").exists():
        path = CONFIGS / f"{config}.yaml"
    try:
        return OmegaConf.load(path)
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"{config}: no such config; give a YAML file or one of {known}") from error
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config}: cannot be read as YAML: {error}") from error


def _merge(values: Any, overrides: list[str], name: str) -> dict[str, Any]:
    if wrong := [override for override in overrides if "=" not in override or override.startswith("=")]:
        raise ConfigError(f"override(s) {', '.join(wrong)}: write them as key=value, for instance optim.lr=1e-3")
    with _refused(name):
        merged = OmegaConf.merge(values)
    for override in overrides:
        with _refused(f"{name}: {override}"):
            _override(merged, override)
    with _refused(name):
        container = OmegaConf.to_container(merged, resolve=True)
    if not isinstance(container, dict):
        raise ConfigError(f"{name}: must hold keys and values, not a list")
    return {str(key): value for key, value in container.items()}


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Say of what OmegaConf refuses where it stands."""
    try:
        yield
    except (YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {str(error).splitlines()[0]}") from error


def _override(merged: Any, override: str) -> None:
    """Put one `key=value` over what is there.

    A text stands for itself, and a number is the one that people read: to YAML the name 1e-3 is a number, 010 is 8 and
    12:30 is 750. In quotes it is YAML's text. Numbers by name take the place of all that were there.
    """
    key, _, text = override.partition("=")
    hint = _leaves(RunConfig, "").get(re.sub(r"\.\d+\.", "[].", key))
    if get_origin(hint) is dict:
        OmegaConf.update(merged, key, OmegaConf.from_dotlist([f"value={text}"])["value"], merge=False)
    elif hint not in TYPE_NAMES or text[:1] in ("'", '"'):
        merged.merge_with_dotlist([override])
    else:
        OmegaConf.update(merged, key, text)


def _build(cls: type, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """Make `cls` out of `values`; add what is wrong to `problems` and return None then."""
    hints, arguments, unusable, before = get_type_hints(cls), {}, [], len(problems)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            problems.append(_unknown(name, cls))
        elif item := _item(hints[key]):
            arguments[key] = _build_all(item, value, name, problems)
        elif kinds := _sections(hints[key]):
            if not isinstance(value, dict):
                problems.append(f"{name}: is a section with keys of its own, not {value!r}")
            elif section := _chosen(kinds, value):
                arguments[key] = _build(section, value, f"{name}.", problems)
            else:
                known = ", ".join(_default_name(kind) for kind in kinds)
                problems.append(f"{name}.name: must be one of {known}, not {value['name']!r}")
        else:
            try:
                if hints[key] is bool and str(value).lower() not in SWITCH:
                    raise OmegaConfBaseException  # It would take any number but 0 for true.
                alone = OmegaConf.structured(make_dataclass("Alone", [(key, hints[key])]))
                arguments[key] = _plain(getattr(OmegaConf.merge(alone, {key: value}), key))
            except OmegaConfBaseException:
                problems.append(f"{name}: must be {_type_name(hints[key])}, not {value!r}")
                unusable.append(key)
    required = {key.name for key in fields(cls) if key.default is MISSING and key.default_factory is MISSING}
    problems.extend(f"{prefix}{key}: is missing" for key in sorted(required - values.keys()))
    if required - arguments.keys() or any(argument is None for argument in arguments.values()):
        return None
    try:
        made = cls(**arguments)
    except ConfigProblems as error:
        # What a check says about a default in the place of an unusable value would mislead.
        sound = [problem for problem in error.problems if not any(key in problem for key in unusable)]
        problems.extend(f"{prefix}{problem}" for problem in sound)
        return None
    return made if len(problems) == before else None


def _plain(value: Any) -> Any:
    """Return a value without OmegaConf's own lists and dicts."""
    if not OmegaConf.is_config(value):
        return value
    found = OmegaConf.to_container(value)
    return found if isinstance(found, dict) else tuple(found)  # type: ignore[arg-type]


def _build_all(cls: type, values: Any, name: str, problems: list[str]) -> Any:
    """Make a tuple of `cls` out of a list of sections; return None where something is wrong with one."""
    if not isinstance(values, list | tuple):
        problems.append(f"{name}: is a list of sections, each with keys of its own, not {values!r}")
        return None
    made = []
    for number, value in enumerate(values):
        if isinstance(value, dict):
            made.append(_build(cls, value, f"{name}[{number}].", problems))
        else:
            problems.append(f"{name}[{number}]: is a section with keys of its own, not {value!r}")
            made.append(None)
    return None if None in made else tuple(made)


def _item(hint: Any) -> type | None:
    """Return the dataclass of which a hint's list is made; None where it is no such list."""
    item = get_args(hint)[0] if get_origin(hint) is tuple else None
    return item if is_dataclass(item) else None  # type: ignore[return-value]


def _sections(hint: Any) -> list[Any]:
    """Return the dataclasses that a hint stands for, the default first; where there are several, `name` chooses."""
    return list(MODELS) if hint is ModelConfig else [hint] if is_dataclass(hint) else []


def _chosen(kinds: list[Any], values: dict[str, Any]) -> Any:
    if len(kinds) == 1 or "name" not in values:
        return kinds[0]
    return next((kind for kind in kinds if _default_name(kind) == values["name"]), None)


def _default_name(kind: type) -> str:
    return next(field.default for field in fields(kind) if field.name == "name")  # type: ignore[arg-type]


def _unknown(name: str, cls: type) -> str:
    """Say that `cls` has no such key, and which one may have been meant."""
    known, shown, name = _leaves(RunConfig, ""), name, re.sub(r"\[\d+\]", "[]", name)
    if name in known:
        section = name.rpartition(".")[0]
        return f"{shown}: unknown key where {section}.name={_default_name(cls)}"
    same_leaf = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = same_leaf or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"{shown}: unknown key" + (f"; did you mean {' or '.join(close)}?" if close else "")


def _leaves(cls: type, prefix: str) -> dict[str, Any]:
    """Return the type of every key."""
    found = {}
    for key, hint in get_type_hints(cls).items():
        kinds = _sections(hint)
        for kind in kinds:
            found |= _leaves(kind, f"{prefix}{key}.")
        if item := _item(hint):
            found |= _leaves(item, f"{prefix}{key}[].")
        if not kinds:
            found[f"{prefix}{key}"] = hint
    return found


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    return TYPE_NAMES.get(hint) or ("texts in a list" if get_origin(hint) is tuple else "numbers by name")


def _docs(cls: type) -> dict[str, str]:
    """Read the texts that stand under the fields in the source of a config dataclass."""
    definition = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                found[name] = " ".join(doc.split())
    return found


def _yaml(key: str, value: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create({key: value})).strip()
