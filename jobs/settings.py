"""Settings that a study has found, as a file, and configs that take them.

A settings file holds ordinary keys of a config, and a section `from` that says who found them: the study, its run and
question, of each key the interval and the reason, and the widths at which they hold. It lies over the config and under
the command line. What a config has from such files it keeps in a section `from` of its own, by key, so that a run's
record tells where each value comes from, whoever started it and however often it went on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs.build import hint_of, refuse_all, unknown_key
from jobs.load import ORIGINS, as_yaml, load_settings, plain_yaml, read, values_of
from jobs.screen import Screen
from jobs.study.numbers import plain, text_of
from jobs.study.question import Answer, Setting, Study
from orchestrator.config import RunConfig, flatten
from workers.common.errors import ConfigError

COMMAND_LINE = "command line"
RULE, BASE_WIDTH, WIDTH = "optim.width_rule", "optim.base_width", "model.hidden_size"
OPTIMIZER = "optim.name"
CONDITIONS = (RULE, BASE_WIDTH, WIDTH, OPTIMIZER)
"""Keys that say at which width, and with which optimizer, others were found."""
CONDITIONED = ("optim.lr", "optim.weight_decay")
"""Keys whose best values depend on that."""
MOST_TOLD = 4000
"""Characters of a tag."""


@dataclass(frozen=True)
class Found:
    """A settings file."""

    file: str
    """As it was named."""
    settings: Mapping[str, Any]
    """By key of a config."""
    study: str
    run: str
    """Of the study, in MLflow; empty where it has none."""
    found_at: Mapping[str, Any] = field(default_factory=dict)
    """CONDITIONS."""

    @property
    def told(self) -> str:
        """Where its values come from."""
        run = f", run {self.run}" if self.run else ""
        return f"{Path(self.file).name} of study {self.study}{run}"


@dataclass(frozen=True)
class Configured:
    """A config, and where some of its values come from."""

    config: RunConfig
    origins: Mapping[str, str]
    """Of every key that a settings file has set, here or when the config was put down."""
    warnings: tuple[str, ...] = ()

    def yaml(self) -> str:
        """Return the resolved config, from which the same one can be made again, origins and all."""
        origins = f"{ORIGINS}:\n" + "".join(f"  {line}\n" for line in as_yaml(dict(self.origins)).splitlines())
        return plain_yaml(self.config) + (origins if self.origins else "")

    def told(self) -> dict[str, str]:
        """Return the value and the origin of each of these keys."""
        values = flatten(asdict(self.config))
        return {key: f"{values.get(key, '')} from {origin}" for key, origin in self.origins.items()}

    @property
    def tags(self) -> dict[str, str]:
        """Of the run."""
        told = "; ".join(f"{key}={text}" for key, text in self.told().items())
        return {"raymuon.settings": told[:MOST_TOLD]} if told else {}


def configured(config: str, files: Iterable[str], overrides: Sequence[str]) -> Configured:
    """Return the config of a YAML file (or a built-in one) with settings files and overrides over it, in this order.

    Raises:
        ConfigError: with every problem that was found.
    """
    return configured_values(read(config), files, overrides, config)


def configured_values(values: Any, files: Iterable[str], overrides: Sequence[str], name: str) -> Configured:
    """Do the same with nested values, as a run has put them down."""
    found = [read_settings(file) for file in files]
    named = f"{name} with {', '.join(one.file for one in found)}" if found else name
    config = load_settings(values, [one.settings for one in found], named, list(overrides))
    changed = {override.partition("=")[0] for override in overrides}
    warnings = [text for one in found for text in _check_conditions(one, config, changed)]
    return Configured(config, _origins(values, found, changed), tuple(warnings))


def warn(found: Configured) -> None:
    """Say on stderr what may not hold."""
    for text in found.warnings:
        Screen(stderr=True).print(text, style="yellow")


def read_settings(file: str) -> Found:
    """Read a settings file.

    Raises:
        ConfigError: it is none, or has a key that no config has.
    """
    where = f"--with {file}"
    if not Path(file).is_file():
        raise ConfigError(f"{where}: no such file; a study that has found settings writes a settings.yaml")
    values = values_of(file)
    source = values.pop(ORIGINS, None)
    if not (isinstance(source, dict) and isinstance(source.get("study"), str)):
        raise ConfigError(
            f"{where}: is no settings file: it has no section {ORIGINS} that names the study; a whole config goes into "
            "CONFIG's place, and single keys are written as key=value"
        )
    settings = dict(_leaves(values))
    refuse_all(where, [problem for key in settings if (problem := unknown_key(key))])
    if not settings:
        raise ConfigError(f"{where}: has no key of a config beside the section {ORIGINS}")
    return Found(file, settings, source["study"], str(source.get("run") or ""), dict(source.get("found_at") or {}))


def settings_yaml(study: Study, answer: Answer, run_id: str, conditions: Mapping[str, Any] = {}) -> str:
    """Return a settings file.

    Args:
        study: that has been answered.
        answer: with settings.
        run_id: of the study in MLflow; may be empty.
        conditions: values of CONDITIONS that all trials had.
    """
    values: dict[str, Any] = {}
    for key, one in answer.settings.items():
        _put(values, key, plain(one.value))
    known = {**conditions, **answer.found_at, **{key: one.value for key, one in answer.settings.items()}}
    source = {
        "study": study.name,
        "run": run_id,
        "question": study.question.name,
        "found_at": {key: known[key] for key in CONDITIONS if key in known},
        "keys": {key: {"low": one.low, "high": one.high, "why": one.why} for key, one in answer.settings.items()},
    }
    return f"# Found by a study: raymuon train CONFIG --with FILE\n{as_yaml({**values, ORIGINS: plain(source)})}"


def conditions_of(config: RunConfig, varied: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the CONDITIONS of a study's trials: those that none of them has settings of its own for."""
    own = {key for settings in varied for key in settings}
    return {key: value for key, value in flatten(asdict(config)).items() if key in CONDITIONS and key not in own}


def value_of(setting: Setting) -> str:
    """Return a setting's value as its file has it, on one line."""
    value = setting.value
    return f"{value:g}" if isinstance(value, float) else str(value)


def interval_of(setting: Setting) -> str:
    """Return a setting's interval; a dash where it has none."""
    if setting.low is None and setting.high is None:
        return text_of(None)
    low, high = ("" if end is None else f"{end:.3g}" for end in (setting.low, setting.high))
    return f"{low} to {high}"


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the keys of a config and their values: a key whose value is a dict is one, too."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and hint_of(key) is None:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _origins(values: Any, found: Sequence[Found], changed: set[str]) -> dict[str, str]:
    """Return the origin of each key that a settings file has set: of several the last, and over it the command line."""
    before = values.get(ORIGINS) if hasattr(values, "get") else None
    origins = {str(key): str(text) for key, text in (before or {}).items()}
    for one in found:
        origins |= dict.fromkeys(one.settings, one.told)
    for key, origin in origins.items():
        if key in changed:
            origins[key] = COMMAND_LINE
        elif any(other.startswith(f"{key}.") for other in changed):
            origins[key] = f"{origin}, changed by the {COMMAND_LINE}"
    return origins


def _check_conditions(found: Found, config: RunConfig, changed: set[str]) -> Iterable[str]:
    """Yield what may not hold in this config.

    Raises:
        ConfigError: a value was found with another optimizer, or is relative to another base width.
    """
    keys = [key for key in CONDITIONED if key in found.settings and key not in changed]
    known, named = flatten(asdict(config)), " and ".join(keys)
    if not keys:
        return
    if found.found_at.get(OPTIMIZER, known[OPTIMIZER]) != known[OPTIMIZER]:
        raise ConfigError(
            f"--with {found.file}: {named} was found with {OPTIMIZER}={found.found_at[OPTIMIZER]}, and this config has "
            f"{OPTIMIZER}={known[OPTIMIZER]}; set {named} on the command line"
        )
    if WIDTH in found.found_at or str(found.found_at.get(RULE, "none")) != "none":
        yield from _check_width(found, named, _width_of(known), _width_of(found.found_at))


def _check_width(found: Found, named: str, ours: tuple[str, Any], its: tuple[str, Any]) -> Iterable[str]:
    (rule, width), (its_rule, its_width) = ours, its
    if rule == "none" == its_rule:
        if width != its_width:
            yield (
                f"{found.file}: {named} was found at {WIDTH}={its_width} and without a rule of widths; at {width} "
                "another value may be better"
            )
    elif width != its_width or its_rule not in ("none", rule):
        also = "" if its_rule == "none" else f" {RULE}={its_rule}"
        raise ConfigError(
            f"--with {found.file}: {named} was found at a width of {its_width} with {RULE}={its_rule}, and this config "
            f"has {RULE}={rule} from a width of {width}; take {BASE_WIDTH}={its_width}{also}, or set {named} on the "
            "command line"
        )


def _width_of(known: Mapping[str, Any]) -> tuple[str, Any]:
    """Return a rule of widths, and the width at which it changes nothing: without a rule the model's own."""
    rule = str(known.get(RULE, "none"))
    return rule, known[WIDTH] if rule == "none" else known.get(BASE_WIDTH)
