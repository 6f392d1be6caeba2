"""A folder of task files of one's own: read whole where the command runs, and laid down where a task of Ray's runs.

lm-eval leaves out a file that it cannot read, without a word; here it is an error before anything is begun.
"""

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
        _check(files[file], f"{url.rstrip('/')}/{file}")
    return TaskFolder(files)


def _check(text: bytes, where: str) -> None:
    """Refuse what is no task file.

    Raises:
        ConfigError: it is none.
    """
    try:
        parsed = _Loader(text).get_single_data()  # It makes nothing but texts, numbers, lists and maps.
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: broken YAML: {' '.join(str(error).split())}") from error
    if not isinstance(parsed, dict) or not any(isinstance(parsed.get(key), str) for key in ("task", "group")):
        raise ConfigError(f"{where}: no task file: it needs a `task` or a `group` with a name")


class _Loader(yaml.SafeLoader):
    """YAML in which `!function` names a function, which is not looked for."""


def _function(loader: Any, node: Any) -> str:
    return str(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)
