"""MLflow's client as raymuon opens it: of one server or database, patient with a lock, and with errors of one line.

The database of a folder is opened by one process at a time: MLflow makes its tables without asking who else does.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from orchestrator.config import database
from workers.common.errors import ConfigError, StorageError

LOCKED_S = 30
"""How long a database that another process has locked is waited for."""
logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # It prints what it raises, too, with tracebacks.


def open_client(uri: str) -> mlflow.MlflowClient:
    """Return a client of this server alone, that gives up within seconds; by itself it would try for minutes.

    Whatever the environment says: models are registered where the runs are, and a row that is told written is.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is for results.
    if (file := database(uri)) is None:
        return mlflow.MlflowClient(uri, registry_uri=uri)
    waiting = uri if "timeout=" in uri else f"{uri}{'&' if '?' in uri else '?'}timeout={LOCKED_S}"
    with _alone(file.parent):
        return mlflow.MlflowClient(waiting, registry_uri=waiting)


def run_of_id(client: mlflow.MlflowClient, run: str) -> Run | None:
    """Return the run with this id; None where there is none, or none that this account may read."""
    try:
        return client.get_run(run)
    except MlflowException as error:
        # A server with accounts tells whoever is no admin that a run which is not there is not for them.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"):
            raise
        return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other drivers of this machine from making the same database's tables meanwhile: half of them would be there.

    The folder is locked, not the database, whose own locks SQLite would lose with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # Some network disks cannot lock.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Turn whatever MLflow or its store's driver raises into a StorageError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        told = first_line(error)
        if "database is locked" in told:
            told += f"; another process has held it for {LOCKED_S} s: end that one, or use an MLflow server"
        raise StorageError(f"tracking.uri={uri}: {told}") from error


def file_of(uri: str) -> tuple[int, int] | None:
    """Return which file a local database is; None where there is none, or a server."""
    if (file := database(uri)) is not None:
        with suppress(OSError):
            found = file.stat()
            return found.st_dev, found.st_ino
    return None


def beside(uri: str) -> str | None:
    """Return the artifact folder for a local database, None for a server."""
    file = database(uri)
    return None if file is None else (file.parent / "artifacts").as_uri()


def first_line(error: BaseException) -> str:
    """Return what an error says, without what comes after its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
