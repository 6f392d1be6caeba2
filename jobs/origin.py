"""What `train.init` may name besides a checkpoint: a run, and a folder of Hugging Face's, which becomes one."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jobs.config_json import model_folder
from jobs.runs import find
from orchestrator.config import RunConfig
from orchestrator.log.run_log import RunLog, split_step
from orchestrator.origin import check_state
from workers.common.errors import ConfigError
from workers.common.storage import Store, is_remote, shared_url

IMPORTS = "imports"
"""Folder below `checkpoint.url` in which imported models lie."""


def with_checkpoint(config: RunConfig, say: Callable[[str], object]) -> RunConfig:
    """Return a config whose `train.init` is a checkpoint.

    Args:
        config: as a person has written it.
        say: told what was made of it.

    Raises:
        ConfigError: it names nothing, or what cannot be imported.
        StorageError: MLflow or storage does not answer.
    """
    base, step = split_step(config.train.init)
    if not base or is_remote(base):
        return config
    if (folder := model_folder(base)) is not None:
        if step is not None:
            raise ConfigError(f"train.init={config.train.init}: a Hugging Face folder has no steps; leave @{step} out")
        check_state(config, None)  # An import of many gigabytes that would be refused is not made.
        found = _imported(folder, config, say)
    elif names_run(config.train.init):
        run = _run(base, config)
        found = run if step is None else f"{run}@{step}"
        say(f"train.init={config.train.init}: the checkpoint {found}")
    else:
        return config
    return replace(config, train=replace(config.train, init=found))


def names_run(init: str) -> bool:
    """Tell whether a value of `train.init` is the name or id of a run of MLflow, rather than a place."""
    base, _ = split_step(init)
    return bool(base) and not is_remote(base) and "/" not in base and not Path(base).exists()


def _run(name: str, config: RunConfig) -> str:
    try:
        return find(name, config.tracking.uri, config.storage.s3_endpoint).store.url
    except ConfigError as error:
        raise ConfigError(
            f"train.init={name}: there is no such folder, and as a run: {error}; name a checkpoint (FOLDER or "
            "FOLDER@STEP), a run of MLflow, or a folder of Hugging Face's"
        ) from error


def _imported(folder: Path, config: RunConfig, say: Callable[[str], object]) -> str:
    """Return the checkpoint of a folder of Hugging Face's; made once of the same files.

    One whose process was killed is left alone: it has no commit, and the next one has a name of its own.
    """
    from jobs.import_ import import_model

    endpoint, number = config.storage.s3_endpoint, 0
    places = f"{shared_url(config.checkpoint.url)}/{IMPORTS}/{_files_hash(folder)}"
    while (store := Store(f"{places}-{number}", endpoint)).names(""):
        if RunLog(store).commits:
            say(f"train.init={folder}: as it was imported before, {store.url}")
            return store.url
        number += 1
    url = import_model(str(folder), store.url, say, endpoint)
    say(f"train.init={folder}: imported as {url}")
    return url


def _files_hash(folder: Path) -> str:
    """Return what changes with a folder's files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    known = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]
