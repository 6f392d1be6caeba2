"""YAML and `key=value` overrides into one typed RunConfig: with `build` the only place that knows OmegaConf.

All problems of a file are gathered and told at once.
"""

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import indent
from typing import Any, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from jobs.build import TYPE_NAMES, build, converted, hint_of, plain
from orchestrator.config import RunConfig
from workers.common.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
ORIGINS = "from"
"""Section of a file that is no part of the config: it tells where values come from (`jobs.settings`)."""


def load(config: str, overrides: list[str]) -> RunConfig:
    """Return the RunConfig of a YAML file (or a built-in one, by its name) with the overrides on top.

    Raises:
        ConfigError: with every problem that was found.
    """
    return load_values(read(config), overrides, config)


def load_values(values: Any, overrides: list[str], name: str) -> RunConfig:
    """Return the RunConfig of nested values, as a run has put them down, with the overrides on top.

    Args:
        values: nested dicts, or what OmegaConf has made of them.
        overrides: `key=value`.
        name: of the config, for messages.

    Raises:
        ConfigError: with every problem that was found.
    """
    merged = _merge(values, overrides, name)
    merged.pop(ORIGINS, None)
    return build(RunConfig, merged, f"config {name}")


def load_settings(
    values: Any, layers: Iterable[Mapping[str, Any]], name: str, overrides: Sequence[str] = ()
) -> RunConfig:
    """Return the RunConfig of nested values with layers of settings on top, each over those before it.

    Args:
        values: as `read` returns them.
        layers: by key (`optim.lr`), with values of any type.
        name: of the config, for messages.
        overrides: `key=value`, over all of them.

    Raises:
        ConfigError: with every problem that was found.
    """
    with _refused(name):
        merged = OmegaConf.merge(values)
    for settings in layers:
        for key, value in settings.items():
            with _refused(f"{name}: {key}"):
                OmegaConf.update(merged, key, value, merge=get_origin(hint_of(key)) is not dict)
    return load_values(merged, list(overrides), name)


def values_of(source: str | Path) -> dict[str, Any]:
    """Return what a YAML file holds.

    Raises:
        ConfigError: it cannot be read, or holds no keys.
    """
    return _merge(_opened(Path(source), str(source)), [], str(source))


def documented_yaml(config: RunConfig, origins: Mapping[str, str] = {}) -> str:
    """Return the config as YAML with the documentation of every key above it, and where its value comes from if told.

    Args:
        config: of a run.
        origins: of some keys (`optim.lr`).
    """
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
            if origin := origins.get(f"{section.name}.{key.name}"):
                lines.append(f"  # From {origin}.")
            lines.append(indent(_yaml(key.name, getattr(value, key.name)), "  "))
    return "\n".join(lines)


def plain_yaml(config: RunConfig) -> str:
    """Return the resolved config as YAML."""
    return as_yaml(asdict(config))


def as_yaml(values: dict[str, Any]) -> str:
    """Return nested values as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(values))


def parsed(override: str) -> tuple[str, Any]:
    """Return the key and the value of a `key=value`.

    Raises:
        ConfigError: it is none.
    """
    merged = OmegaConf.create({})
    _check_form([override])
    with _refused(override):
        _override(merged, override)
    key = override.partition("=")[0]
    with _refused(override):
        value = plain(OmegaConf.select(merged, key))
        return key, converted(hint, value) if (hint := hint_of(key)) in TYPE_NAMES else value


def read(config: str) -> Any:
    """Return what a YAML file holds, or a built-in config, by its name.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = Path(config)
    if not path.is_file() and path.name == config and (CONFIGS / f"{config}.yaml").exists():
        path = CONFIGS / f"{config}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"{config}: no such config; give a YAML file or one of {known}")
    return _opened(path, config)


def _opened(path: Path, name: str) -> Any:
    try:
        return OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: cannot be read as YAML: {error}") from error


def _check_form(overrides: list[str]) -> None:
    if wrong := [override for override in overrides if "=" not in override or override.startswith("=")]:
        raise ConfigError(f"override(s) {', '.join(wrong)}: write them as key=value, for instance optim.lr=1e-3")


def _merge(values: Any, overrides: list[str], name: str) -> dict[str, Any]:
    _check_form(overrides)
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
    hint = hint_of(key)
    if get_origin(hint) is dict:
        OmegaConf.update(merged, key, OmegaConf.from_dotlist([f"value={text}"])["value"], merge=False)
    elif hint not in TYPE_NAMES or text[:1] in ("'", '"'):
        merged.merge_with_dotlist([override])
    else:
        OmegaConf.update(merged, key, text)


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
