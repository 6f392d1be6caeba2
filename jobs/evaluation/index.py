"""Where tasks are: raymuon's, a person's, and of lm-eval's thousands the few that are asked for.

lm-eval parses fourteen thousand files to know its tasks, which takes half a minute. Here the files are searched as text
for the names that are needed, and the folders in which they are given are parsed.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

GIVEN = re.compile(r"""^(?:task|group): *['"]?([^'"\s#]+)""", re.MULTILINE)
"""A name that a file gives."""


def task_manager(names: Sequence[str], paths: Sequence[Path]) -> Any:
    """Return lm-eval's `TaskManager` of these names and of all that they are made of.

    Args:
        names: of tasks, groups and tags; the manager lacks those that nobody has.
        paths: folders of task files, which go before lm-eval's own; the last before the others.
    """
    from lm_eval.tasks import TaskManager

    places: list[Path] = []
    while True:
        manager = TaskManager(include_path=[*places, *paths], include_defaults=False)
        _complete_tags(manager.task_index)
        missing = {one for name in names for one in below(name, manager.task_index)} - manager.task_index.keys()
        if not (found := _places_of(missing) - set(places)):
            return manager
        places += sorted(found)


def below(name: str, index: Mapping[str, Any]) -> dict[str, None]:
    """Return a name and those of all that it is made of, whether or not they are in the index."""
    found: dict[str, None] = {}
    waiting = [name]
    while waiting:
        if (one := waiting.pop()) not in found:
            found[one] = None
            waiting += reversed(list(_members_of(index[one]))) if one in index else []
    return found


def lm_evals_names() -> list[str]:
    """Return the names of all tasks and groups that come with lm-eval."""
    return sorted({name for text in _texts().values() for name in GIVEN.findall(text)})


def _complete_tags(index: Mapping[str, Any]) -> None:
    """Give each tag all of its tasks: of several folders lm-eval takes those in the last one alone."""
    for name, entry in index.items():
        for tag in entry.tags if entry.cfg is not None else ():
            if tag in index and index[tag].cfg is None:
                index[tag].tags.add(name)


def _members_of(entry: Any) -> Iterator[str]:
    yield from sorted(entry.tags) if entry.cfg is None else _members(entry.cfg)


def _members(config: Mapping[str, Any]) -> Iterator[str]:
    for member in config["task"] if isinstance(config.get("task"), list) else []:
        if isinstance(member, str):
            yield member
        elif isinstance(member.get("task"), list):  # A group that is written out within the other.
            yield from _members(member)
        else:
            yield member.get("group") or member["task"]


def _places_of(names: Collection[str]) -> set[Path]:
    """Return the folders of lm-eval's in which a file gives one of these names, or has it in a list."""
    if not names:
        return set()
    anyone = "|".join(map(re.escape, names))
    given = re.compile(rf"""^(?:task: *|group: *|tag: *| *- +)['"]?(?:{anyone})['"]? *$""", re.MULTILINE)
    return {file.parent for file, text in _texts().items() if given.search(text)}


@cache
def _texts() -> dict[Path, str]:
    import lm_eval

    root = Path(lm_eval.__file__).parent / "tasks"
    return {file: file.read_text() for file in root.rglob("*.yaml")}
