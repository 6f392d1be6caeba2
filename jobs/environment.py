"""Environments: this process's, and what a job takes with it: our code and the versions of all that it needs."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from workers.common.errors import ConfigError
from workers.common.source import ROOMS, ROOT

CONFIG = "config.yaml"
"""The run's config in the working directory."""


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set variables of this process's environment for as long as the block takes."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def working_directory(files: Mapping[str, str]) -> Iterator[Path]:
    """Yield a folder with the code of this installation and some files: what Ray sends to the cluster.

    Args:
        files: texts by name.
    """
    with TemporaryDirectory(prefix="raymuon-job-") as folder:
        for room in ROOMS:
            shutil.copytree(
                ROOT / room, Path(folder) / room, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
            )
        for name, text in files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_text(text)
        yield Path(folder)


def pins() -> list[str]:
    """Return everything that raymuon needs, at the versions that are installed here: `name==version`, sorted.

    Raises:
        ConfigError: raymuon itself, or a part of what it needs, is not installed here.
    """
    found: dict[str, str] = {}
    waiting = [Requirement("raymuon")]
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        try:
            known = distribution(name)
        except PackageNotFoundError as error:
            raise ConfigError(f"{name} is not installed here, so its version cannot be told to the cluster") from error
        for text in known.requires or []:
            needed = Requirement(text)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                key = re.sub(r"[-_.]+", "-", needed.name).lower()
                if key not in found or needed.extras:
                    waiting.append(needed)
        # A local label (`+cpu`) is of a build, which the cluster chooses by its own hardware.
        fresh = {} if name == "raymuon" else {name: known.version.partition("+")[0]}
        found |= fresh
    return [f"{name}=={version}" for name, version in sorted(found.items())]
