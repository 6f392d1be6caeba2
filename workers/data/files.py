"""Which files `data.source` means: literal names first, then patterns; never what runs have left among the texts.

A part that finds nothing is an error even where the others find something: a run on half of the text is another run,
and nobody would notice.
"""

import os
import re
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from workers.common.errors import ConfigError
from workers.common.storage import open_source, storage_errors

STDLIB = "python-stdlib"
STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
MAGIC = re.compile(r"[*?\[]")

_RUN = "[0-9a-f]{32}"
OUTPUT = re.compile(
    r"/[0-9a-f]{16}/(index\.json$|(train|validation)-\d+\.(bin|sums|ends|counts)$|(groups|keys)/\d+\.)"  # prepared
    rf"|/{_RUN}(\.png$|/(lease\.json$|log/|manifests/|shards/|journal/|artifacts/))"  # a run's, MLflow's
    r"|/tokenizer/(tokenizer(_config)?\.json|chat_template\.jinja)$"
    r"|/log/\d{8}\.json$|/manifests/[\d-]+\.json$|/journal/\d{4}-\d{6}\.jsonl$"  # of an import, which has a name
    r"|/\d{4}-\d{4}-\d{5}\.jsonl$"  # a ledger
    r"|/mlflow\.db(-journal|-wal|-shm)?$|\.safetensors$"
)
"""What runs and exports write, by the names that raymuon gives: the same wherever the run was told to put it."""
OUTPUT_BELOW = re.compile(r"(^|/)(mlruns|mlartifacts|runs/(artifacts|checkpoints|data|plots|replays|stack))/")
"""The folders' default names: left out where a folder over them is read, for one may be named itself."""


def parts_of(source: str, ask_servers: bool = True, s3_endpoint: str = "") -> list[str]:
    """Return the parts of a source; a comma belongs to a name where a file or folder of that name is there.

    Args:
        source: parts with commas between them.
        ask_servers: look for such names at URLs, too.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        StorageError: a place cannot be looked at.
    """
    pieces, parts = source.split(","), []
    while pieces:
        end = 1
        while end < len(pieces) and "://" not in pieces[end] and not is_standard_library(pieces[end].strip()):
            end += 1
        if "://" in pieces[0] and not ask_servers:
            end = 1
        while end > 1 and not _there(",".join(pieces[:end]).strip(), s3_endpoint):
            end -= 1
        parts.append(",".join(pieces[:end]).strip())
        del pieces[:end]
    return [part for part in parts if part]


def files_of(
    source: str, outputs: Collection[str] = (), s3_endpoint: str = ""
) -> Iterator[tuple[AbstractFileSystem, str]]:
    """Yield the files of a source, in a fixed order.

    Args:
        source: names, folders and globs of any fsspec URL with commas between them, or `python-stdlib`, or a folder
            of it: `python-stdlib/json`.
        outputs: absolute paths of the run's own files whose names a person has chosen.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: a part finds nothing.
        StorageError: a place cannot be looked at: a part of the text would be another run.
    """
    if not (parts := parts_of(source, s3_endpoint=s3_endpoint)):
        raise ConfigError(f"data.source={source!r}: it names nothing")
    yield from _files_of(parts, f"data.source={source!r}", outputs, s3_endpoint)


def files_of_urls(
    urls: Sequence[str], outputs: Collection[str] = (), s3_endpoint: str = "", key: str = "data.sources"
) -> Iterator[tuple[AbstractFileSystem, str]]:
    """Do the same for URLs that stand each for itself, whatever commas are in them.

    Args:
        urls: names, folders and globs of any fsspec URL, or `python-stdlib`.
        outputs: absolute paths of the run's own files whose names a person has chosen.
        s3_endpoint: of an S3 store that is not AWS.
        key: of the config, for messages: `data.sources[NAME].urls`.

    Raises:
        ConfigError: a URL finds nothing.
        StorageError: a place cannot be looked at.
    """
    parts = [url.strip() for url in urls]
    if not all(parts) or not parts:
        raise ConfigError(f"{key}={list(urls)!r}: one or all of them name nothing")
    yield from _files_of(parts, f"{key}={(parts[0] if len(parts) == 1 else parts)!r}", outputs, s3_endpoint)


def _files_of(
    parts: Sequence[str], key: str, outputs: Collection[str], s3_endpoint: str
) -> Iterator[tuple[AbstractFileSystem, str]]:
    for part in parts:
        if is_standard_library(part):
            fs, found = fsspec.filesystem("file"), _standard_library(part.removeprefix(STDLIB).strip("/"))
        else:
            with storage_errors(part):
                fs, path = open_source(part, s3_endpoint)
                found = _found(fs, path, outputs)
        if not found:
            of = "" if len(parts) == 1 else f" in {part!r}"
            why = f"no file found{of}; name a file, a folder, a glob or a URL with text in it"
            why += " (below a folder hidden files do not count, nor what runs have written)"
            raise ConfigError(f"{key}: {why}")
        yield from ((fs, name) for name in found)


def is_standard_library(part: str) -> bool:
    """Tell whether a part of a source is the standard library, or some of it: `python-stdlib/json`."""
    return part == STDLIB or part.startswith(f"{STDLIB}/")


def _standard_library(below: str) -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted((root / below).rglob("*.py"))
    return [str(path) for path in found if not STDLIB_SKIPS & set(path.relative_to(root).parts)]


def _there(part: str, s3_endpoint: str) -> bool:
    """Tell whether a name with a comma in it is there, or a glob below a folder of such a name."""
    with storage_errors(part):
        fs, path = open_source(part, s3_endpoint)
        if _info(fs, path) is not None:
            return True
        folder, pattern = _literal_part(fs, path)
        return "," in folder and "," not in pattern and fs.isdir(folder)


def _info(fs: AbstractFileSystem, path: str) -> dict[str, Any] | None:
    """Return what the file system knows of exactly that name; `exists` would take wrong keys for a no."""
    try:
        return fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _found(fs: AbstractFileSystem, path: str, outputs: Collection[str]) -> list[str]:
    """Return the files of a name, a folder or a glob, sorted."""
    local, info = isinstance(fs, LocalFileSystem), _info(fs, path)
    if local and info is not None and not Path(path).is_dir():
        return [path] if _is_file(path) else []
    if info is not None and info["type"] == "file" and not path.endswith("/"):
        return [path]
    if fs.isdir(path):
        root, hidden = path.rstrip("/"), False
        names = list(_files_below(root)) if local else _remote_files(fs.find(path, detail=True))
    else:
        root, rest = _literal_part(fs, path)
        hidden = re.search(r"(^|/)\.", rest) is not None  # As in a shell: a pattern says so itself.
        listed: Any = fs.glob(f"{_escaped(root)}/{rest}" if root else rest, detail=True)
        names = [name for name in listed if _is_file(name)] if local else _remote_files(listed)
    return sorted(name for name in names if _is_text(name, root, hidden, outputs))


def _remote_files(listed: Any) -> list[str]:
    return [name for name, info in listed.items() if info["type"] != "directory"]


def _is_file(name: str) -> bool:
    """Tell a file from a folder and a device; a link that leads nowhere is one, and raises where it is read."""
    return Path(name).is_file() or not Path(name).exists()


def _escaped(name: str) -> str:
    return MAGIC.sub(r"[\g<0>]", name)


def _literal_part(fs: AbstractFileSystem, path: str) -> tuple[str, str]:
    """Split a glob into the folder over all that it can match, and the pattern: a folder may be called `[a]`."""
    parts = path.split("/")
    fixed = next((i for i, part in enumerate(parts) if MAGIC.search(part)), len(parts) - 1)
    while fixed < len(parts) - 1 and fs.isdir("/".join(parts[: fixed + 1])):
        fixed += 1
    return "/".join(parts[:fixed]), "/".join(parts[fixed:])


def _is_text(name: str, root: str, hidden: bool, outputs: Collection[str]) -> bool:
    below = name[len(root) :].lstrip("/") if name.startswith(root) else name
    if OUTPUT.search(f"/{name}") or OUTPUT_BELOW.search(below) or _is_one_of(name, outputs):
        return False
    return hidden or not any(part.startswith(".") for part in below.split("/"))


def _is_one_of(name: str, outputs: Collection[str]) -> bool:
    alike = any(Path(name).name == Path(one).name for one in outputs)
    return alike and (name in outputs or str(Path(name).resolve()) in outputs)


def _files_below(folder: str) -> Iterator[str]:
    """Yield the files of a folder and of all folders in it that are not hidden, linked ones too, each folder once.

    fsspec leaves out linked folders and what it may not list, and takes a file whose state it cannot get for none.
    """

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for below, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(below)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (path for name in names if _is_file(path := str(Path(below, name))))
