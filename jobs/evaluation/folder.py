"""A folder of task files of one's own: read whole where the command runs, and laid down where a task of Ray's runs.

lm-eval leaves out a file that it cannot read, without a word; here it is an error before anything is begun.
"""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from workers.common.errors import ConfigError
from workers.common.storage import Store, absolute_url

SHIPPED = Path(__file__).with_name("shipped")
"""The task files that come with raymuon."""
MOST_BYTES = 1 << 30
"""Of a folder: it travels in memory."""


@dataclass(frozen=True)
class TaskFolder:
    """Task files, and what lies beside them: data, templates, Python."""

    files: dict[str, bytes]
    """By their paths below the folder."""

    def lay_down(self, at: Path) -> None:
        """Write the files below `at`."""
        for name, content in self.files.items():
            (at / name).parent.mkdir(parents=True, exist_ok=True)
            (at / name).write_bytes(content)


def read_folder(url: str, s3_endpoint: str = "") -> TaskFolder:
    """Read a folder, a local one or an fsspec URL.

    Raises:
        ConfigError: it is not there, has no task file, has one that is none, or is too large.
        StorageError: it cannot be read.
    """
    store = Store(absolute_url(url), s3_endpoint)
    found = store.files("")
    tasks = sorted(name for name in found if name.endswith(".yaml"))
    if not tasks:
        why = "there is no task file (*.yaml) in it" if found or store.exists() else "no such folder"
        raise ConfigError(f"--task-folder {url}: {why}")
    if (size := sum(file.size for file in found.values())) > MOST_BYTES:
        raise ConfigError(
            f"--task-folder {url}: {size / 1e9:.1f} GB, which is more than {MOST_BYTES / 1e9:.1f} GB; name a folder "
            "that holds the tasks and their data alone"
        )
    files = dict(zip(found, store.read_all(list(found)), strict=True))
    for file in tasks:
        parsed = _parsed(files, file, url)
        if not any(isinstance(parsed.get(key), str) for key in ("task", "group")):
            raise ConfigError(f"{_in(url, file)}: no task file: it needs a `task` or a `group` with a name")
    return TaskFolder(files)


def _in(url: str, file: str) -> str:
    return f"{url.rstrip('/')}/{file}"


def _parsed(files: Mapping[str, bytes], file: str, url: str, includers: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the keys of a file, with those of what it includes.

    Raises:
        ConfigError: one of these files is broken, missing, or includes itself.
    """
    try:
        parsed = _Loader(files[file]).get_single_data()  # It makes nothing but texts, numbers, lists and maps.
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_in(url, file)}: broken YAML: {' '.join(str(error).split())}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{_in(url, file)}: no task file: it needs a `task` or a `group` with a name")
    keys: dict[str, Any] = {}
    named = parsed.get("include", [])
    for include in named if isinstance(named, list) else [named]:
        if PurePosixPath(str(include)).is_absolute():  # Of each node's own disk.
            continue
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(file), str(include)))
        if beside not in files or beside in (file, *includers):
            why = "itself" if beside in files else "no file of the folder"
            raise ConfigError(f"{_in(url, file)}: include: {include} is {why}; names are from the file that has them")
        keys |= _parsed(files, beside, url, (file, *includers))
    return keys | parsed


class _Loader(yaml.SafeLoader):
    """YAML in which `!function` names a function, which is not looked for."""


def _function(loader: Any, node: Any) -> str:
    return str(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)
