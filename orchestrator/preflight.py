"""Everything that can be refused is found out before Ray is started and before the MLflow run is made.

So bad input is told within seconds and leaves nothing behind. What is slow (MLflow's import and its database) runs
beside Ray's start and the workers' own imports.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse

from orchestrator.config import RunConfig
from orchestrator.reach import reach
from orchestrator.run_log import RunLog
from workers.checkpoint.manifest import Manifest
from workers.data.corpus import Corpus, check_corpus, prepare
from workers.errors import ConfigError, StorageError
from workers.storage import Store

if TYPE_CHECKING:
    from orchestrator.tracking import Tracking

T = TypeVar("T")


def check_inputs(config: RunConfig) -> Corpus:
    """Check that tracking and storage can be reached and that there is enough data; return the prepared corpus.

    Raises:
        ConfigError: the corpus is missing, empty or too small.
        StorageError: a server does not answer, or storage cannot be written.
    """
    _reach(config.tracking.uri)
    Store(config.checkpoint.url).probe()
    corpus = prepare(config.data)
    if problems := check_corpus(corpus, config.train.seq_len, config.train.global_batch):
        raise ConfigError("\n".join(problems))
    return corpus


@dataclass(frozen=True)
class Found:
    """The tracking store, and the run to go on with and its newest checkpoint, where there is one."""

    tracking: "Tracking"
    run_id: str | None
    manifest: Manifest | None


def find_run(config: RunConfig, corpus: Corpus, resume: str) -> Found:
    """Open the tracking store and find the run that `resume` means: `never`, `auto`, or a run's id or name.

    Raises:
        ConfigError: there is no such run, or this config would make another run of it.
        StorageError: the tracking store or the run's files cannot be read.
    """
    from orchestrator.tracking import Tracking  # MLflow takes seconds to import.

    tracking = Tracking(config.tracking)
    if resume == "never":
        return Found(tracking, None, None)
    run_id = tracking.unfinished(config.run.name) if resume == "auto" else tracking.find(resume)
    manifest = RunLog(run_store(config, run_id)).manifest() if run_id else None
    if manifest is not None:
        _check_identity(identity(config, corpus), manifest)
    return Found(tracking, run_id, manifest)


def run_store(config: RunConfig, run_id: str) -> Store:
    """Return the folder of a run's files."""
    return Store(config.checkpoint.url).child(run_id)


def identity(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """Return what has to be the same for a run to go on: otherwise it would be another run, silently."""
    return {
        "model": asdict(config.model),
        "optim.name": config.optim.name,
        "data": corpus.content_hash,
        "train.seq_len": config.train.seq_len,
        "train.global_batch": config.train.global_batch,
        "seed": config.seed,
    }


def in_background(work: Callable[[], T], may_be_torn: bool) -> Future[T]:
    """Run `work` in a thread.

    Args:
        work: what to do.
        may_be_torn: the process may end in the middle of it. Otherwise its end waits for the work: MLflow, torn while
            it makes the tables of a new database, leaves one that nobody can open.
    """
    future: Future[T] = Future()

    def settle() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=settle, name="preflight", daemon=may_be_torn).start()
    return future


def _check_identity(wanted: dict[str, Any], manifest: Manifest) -> None:
    """Refuse a checkpoint of another model, other data or another batch; name every difference."""
    saved, given = _flat(manifest.identity), _flat(wanted)
    differences = [
        f"  {key}: the checkpoint has {saved.get(key)!r}, the config {value!r}"
        for key, value in given.items()
        if saved.get(key) != value
    ]
    if differences:
        raise ConfigError(
            f"run {manifest.run_id} cannot go on from step {manifest.step} with this config:\n"
            + "\n".join(differences)
            + "\nmake them equal, or start a new run with --resume never"
        )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update({f"{key}.{part}": v for part, v in value.items()} if isinstance(value, dict) else {key: value})
    return leaves


def _reach(uri: str) -> None:
    """Find out whether there is a tracking server, or a folder for the database."""
    parsed = urlparse(uri)
    if parsed.scheme in ("http", "https"):
        port = parsed.port or {"http": 80, "https": 443}[parsed.scheme]
        try:
            reach(parsed.hostname or "", port)
        except OSError as error:
            raise StorageError(
                f"tracking.uri={uri}: no server answers there ({error}); start it, or check the address"
            ) from error
    elif parsed.scheme == "sqlite":
        folder = Path(uri.removeprefix("sqlite:///")).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"tracking.uri={uri}: the folder cannot be made ({error})") from error
