"""Study files: YAML into a typed `Study`, and its trials into configs, with all problems told before anything runs."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from jobs.build import ARCHITECTURES, build, refuse_all, unknown_key
from jobs.load import as_yaml, load_settings, parsed, read, values_of
from jobs.origin import names_run
from jobs.study import questions
from jobs.study.question import Question, Study, Trial, points
from orchestrator.config import RunConfig, absolute, flatten
from workers.common.errors import ConfigError

SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class StudyFile:
    """A study and the config that its base holds."""

    study: Study
    base: Any
    """Nested values."""

    def config(self, trial: Trial, places: Mapping[str, Any]) -> RunConfig:
        """Return the config of a trial.

        A trial has as many workers from its beginning to its end unless the study says otherwise: what its neighbours
        leave free is not its own.

        Args:
            trial: of the study.
            places: settings over all others.

        Raises:
            ConfigError: with every problem that was found.
        """
        study = self.study
        own = {"run.name": f"{study.name}/{trial.name}", "seed": trial.seed}
        layers = [study.settings, trial.settings, own, places]
        config = load_settings(self.base, layers, f"{study.base}, trial {trial.name}")
        if any("scaling.max_workers" in flatten(dict(settings)) for settings in layers):
            return config
        scaling = replace(config.scaling, max_workers=config.scaling.min_workers)
        return replace(config, scaling=scaling)

    def yaml(self) -> str:
        """Return the study as YAML, from which the same one can be made again, given the base."""
        return as_yaml(_plain(asdict(self.study)))  # type: ignore[call-overload]


def load_study(source: str, overrides: Iterable[str] = (), name: str = "") -> StudyFile:
    """Return the study of a YAML file (or a shipped one, by its name).

    Args:
        source: a path or a name.
        overrides: `key=value`, over the study's settings.
        name: of the study, in the place of the file's.

    Raises:
        ConfigError: with every problem that was found.
    """
    path = Path(source)
    if not path.is_file() and path.name == source and (SHIPPED / f"{source}.yaml").exists():
        path = SHIPPED / f"{source}.yaml"
    if not path.exists():
        known = ", ".join(shipped()) or "none"
        raise ConfigError(f"{source}: no such study; give a YAML file or one that is shipped: {known}")
    values = values_of(path)
    values["name"] = name or values.get("name") or path.stem
    asked = values.get("question")
    kinds = [_question(asked.get("name"))] if isinstance(asked, dict) else [Question]
    study = build(Study, values, f"study {source}", {**ARCHITECTURES, Question: kinds})
    study = replace(study, settings={**study.settings, **dict(map(parsed, overrides))})
    _check_keys(study, source)
    if (beside := path.parent / study.base).is_file():  # A file is named from where the study's is.
        study = replace(study, base=str(beside.absolute()))
    return StudyFile(study, read(study.base))


def config_of(study: Study, trial: Trial) -> RunConfig:
    """Return the config of a trial, for a question that asks how large it is.

    Raises:
        ConfigError: with every problem that was found.
    """
    return StudyFile(study, read(study.base)).config(trial, {})


def shipped() -> list[str]:
    """Return the names of the studies that are shipped."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def question_names() -> list[str]:
    """Return the names of all questions: a file for each."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(questions.__path__))


def configs_of(
    found: StudyFile, trials: Sequence[Trial], places: Mapping[str, Any], known: Mapping[str, RunConfig]
) -> tuple[dict[str, RunConfig], dict[str, str]]:
    """Return the config of each trial that is sound, with absolute paths, and what is wrong with each that is not.

    Args:
        found: the study.
        trials: that it asks for.
        places: settings over all others.
        known: configs of trials that it has asked for before.

    Raises:
        ConfigError: two trials have one name.
    """
    by_name = {trial.name: trial for trial in trials}
    if len(by_name) < len(trials):
        names = [trial.name for trial in trials]
        twice = ", ".join(name for name in by_name if names.count(name) > 1)
        raise ConfigError(
            f"study {found.study.name}: two trials have one name: {twice}; a name has six digits of each value, so "
            "values and seeds have to differ in these, and points in their labels"
        )
    configs, problems = dict[str, RunConfig](), dict[str, str]()
    for trial in trials:
        try:
            configs[trial.name] = known.get(trial.name) or _absolute(found.config(trial, places))
        except ConfigError as error:
            problems[trial.name] = (str(error).partition("problem(s)\n")[2] or str(error)).strip()
    for trial in trials:
        if trial.name in configs and (text := _wrong_ends(trial, by_name, configs)):
            problems[trial.name] = text
    return {name: config for name, config in configs.items() if name not in problems}, problems


def _absolute(config: RunConfig) -> RunConfig:
    """Make paths absolute; a run that a trial begins with keeps its name, and is looked up when it begins."""
    made, init = absolute(config), config.train.init
    return replace(made, train=replace(made.train, init=init)) if names_run(init) else made


def refuse(study: Study, problems: Mapping[str, str]) -> None:
    """Refuse a study where something is wrong with a trial; what is wrong with several is told once.

    Raises:
        ConfigError: with all of it.
    """
    alike: dict[str, list[str]] = {}
    for name, text in problems.items():
        alike.setdefault(text, []).append(name)
    if alike:
        told = "\n".join(f"  {_named(names)}: {text}" for text, names in alike.items())
        raise ConfigError(f"study {study.name}: {len(alike)} problem(s) with its trials\n{told}")


def last_step(trial: Trial, config: RunConfig) -> int:
    """Return the step after which a trial ends."""
    return trial.stop_at or config.train.steps


def _wrong_ends(trial: Trial, trials: Mapping[str, Trial], configs: Mapping[str, RunConfig]) -> str:
    """Return what is wrong with where a trial begins and ends; empty where nothing is."""
    steps, branch = configs[trial.name].train.steps, trial.branch
    if not 0 <= trial.stop_at <= steps:
        return f"ends at step {trial.stop_at}, and its schedule has {steps}"
    if branch is None:
        return ""
    if (parent := trials.get(branch.trial)) is None:
        return f"branches from {branch.trial}@{branch.step}, and no trial has that name"
    if theirs := configs.get(parent.name):
        ends = last_step(parent, theirs)
        if not 1 <= branch.step <= ends:
            return f"branches from step {branch.step} of {parent.name}, which has steps 1 to {ends}"
    ends = last_step(trial, configs[trial.name])
    own = f"branches from step {branch.step}, and ends at step {ends}: no step is its own"
    return own if branch.step >= ends else ""


def _check_keys(study: Study, source: str) -> None:
    """Refuse settings and axes whose keys no config has."""
    problems = [unknown_key(key, "settings.") for key in study.settings]
    problems += [] if study.seeds else ["seeds: has none; 0 is the usual one"]
    for axis, values in study.axes.items():
        where = f"axes.{axis}."
        if isinstance(values, list | tuple):
            problems.append(unknown_key(axis, "axes."))
            problems += [f"axes.{axis}: has no value"] if not values else []
            alike = [*map(str, points([*values], axis))]
            twice = (
                f"axes.{axis}: {len(values)} values have {len(alike)} labels, of six digits each: {', '.join(alike)}"
            )
            problems += [twice] if len(alike) < len(values) else []
        elif isinstance(values, dict) and values:
            for label, settings in values.items():
                if isinstance(settings, dict):
                    problems += [unknown_key(key, f"{where}{label}.") for key in settings]
                else:
                    problems.append(f"{where}{label}: is a point with settings, not {settings!r}")
        else:
            problems.append(f"axes.{axis}: is a list of values, or points by name with settings, not {values!r}")
    refuse_all(f"study {source}", [problem for problem in problems if problem])


def _question(name: Any) -> Any:
    """Return the class of a question.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in question_names():
        raise ConfigError(f"question.name: must be one of {', '.join(question_names())}, not {name!r}")
    module = importlib.import_module(f"{questions.__name__}.{name.replace('-', '_')}")
    found = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if _is_called(kind, name)]
    return found[0]


def _is_called(kind: type, name: str) -> bool:
    known = {field.name: field.default for field in kind.__dataclass_fields__.values()} if is_dataclass(kind) else {}
    return known.get("name") == name


def _named(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _plain(value: Any) -> Any:
    """Return nested values with lists in the place of tuples, and text keys."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
