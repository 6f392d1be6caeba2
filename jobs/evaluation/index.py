"""Where tasks are: raymuon's, a person's, and of lm-eval's thousands the few that are asked for.

lm-eval parses fourteen thousand files to know its tasks, which takes half a minute. Here the files are searched as text
for the names that are needed, and the folders in which they are given are parsed. Invariant: what is found is what
lm-eval itself would find. Who belongs to a tag is known from all files alone, and a name may be written in a way that
the search does not see: where that may matter, all files are parsed.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

GIVEN = re.compile(r"""^['"]?(?:task|group)['"]?: *['"]?([^'"\s#]+)""", re.MULTILINE)
"""A name that a file gives."""
UNREAD = (".py", ".pyc", ".md", ".txt", ".jsonl", ".json", ".ipynb", ".png", ".sh")
"""Of lm-eval's files, those that name no task."""


def task_manager(names: Sequence[str], paths: Sequence[Path]) -> Any:
    """Return lm-eval's `TaskManager` of these names and of all that they are made of.

    Args:
        names: of tasks, groups and tags; the manager lacks those that nobody has.
        paths: folders of task files, which go before lm-eval's own; the last before the others.
    """
    from lm_eval.tasks import TaskManager

    places: set[Path] = set()
    own = TaskManager(include_path=list(paths), include_defaults=False).task_index
    while True:
        # Of folders with the same name in them the last counts here, and in lm-eval's own search the first.
        manager = TaskManager(include_path=[*sorted(places, reverse=True), *paths], include_defaults=False)
        wanted = {one for name in names for one in below(name, manager.task_index)}
        missing = wanted - manager.task_index.keys()
        if found := _places_of(missing) - places:
            places |= found
            continue
        tags = {one for one in wanted - missing - own.keys() if manager.task_index[one].cfg is None}
        return TaskManager(include_path=list(paths)) if tags or _mentioned(missing) else manager


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


def _places_of(names: set[str]) -> set[Path]:
    """Return the folders of lm-eval's in which a file gives one of these names."""
    return {file.parent for file, text in _texts().items() if names and not names.isdisjoint(GIVEN.findall(text))}


def _mentioned(names: Collection[str]) -> bool:
    """Tell whether one of these names stands anywhere in lm-eval's files: it may be a tag."""
    anyone = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})(?![\w-])")
    return bool(names) and any(anyone.search(text) for text in _texts(False).values())


@cache
def _texts(tasks: bool = True) -> dict[Path, str]:
    """Return lm-eval's task files; or what other task files include."""
    import lm_eval

    files = (Path(lm_eval.__file__).parent / "tasks").rglob("*")
    wanted = (file for file in files if (file.suffix == ".yaml" if tasks else file.suffix not in UNREAD))
    return {file: file.read_text(errors="replace") for file in wanted if file.is_file()}
