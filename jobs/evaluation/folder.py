"""A folder of task files of one's own: read whole where the command runs, and laid down where a task of Ray's runs.

lm-eval leaves out a file that it cannot read, without a word; here it is an error before anything is begun.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
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
    names: frozenset[str]
    """Of the tasks and groups in it."""

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
    names = frozenset(name for file in tasks for name in names_in(files[file], f"{url.rstrip('/')}/{file}"))
    return TaskFolder(files, names)


def shipped_names() -> frozenset[str]:
    """Return the names of the tasks and groups that come with raymuon."""
    return frozenset(name for file in SHIPPED.glob("*.yaml") for name in names_in(file.read_bytes(), str(file)))


def names_in(text: bytes, where: str) -> Iterator[str]:
    """Yield the names that a task file gives: of a task or a group, and its tags.

    Raises:
        ConfigError: it is no task file.
    """
    try:
        parsed = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: broken YAML: {' '.join(str(error).split())}") from error
    if not isinstance(parsed, dict) or not any(isinstance(parsed.get(key), str) for key in ("task", "group")):
        raise ConfigError(f"{where}: no task file: it needs a `task` or a `group` with a name")
    yield from (parsed[key] for key in ("task", "group") if isinstance(parsed.get(key), str))
    tags = parsed.get("tag") or []
    yield from [tags] if isinstance(tags, str) else tags


class _Loader(yaml.SafeLoader):
    """YAML in which `!function` names a function, which is not looked for."""


def _function(loader: Any, node: Any) -> str:
    return str(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)
