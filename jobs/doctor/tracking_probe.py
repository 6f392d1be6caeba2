"""A look at MLflow as a run's driver uses it: create, log, read back, delete. What it made is gone afterwards.

An experiment that is not there yet is not made: MLflow would keep its name for ever. The right to make one is tried on
one with a name of its own.
"""

import os
import secrets
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.doctor.seen import TrackingSeen
from orchestrator.config import TrackingConfig, database
from orchestrator.reach import reach_tracking
from workers.common.errors import StorageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACT = "raymuon-doctor.txt"


def look_at_tracking(config: TrackingConfig) -> TrackingSeen:
    """Try what a run does with its tracking, within seconds."""
    began = time.monotonic()
    seen = TrackingSeen(uri=config.uri, client=version("mlflow"))
    try:
        reach_tracking(config.uri)
    except StorageError as error:
        return replace(seen, error=str(error).removeprefix(f"tracking.uri={config.uri}: ").partition(";")[0])
    if (file := database(config.uri)) is not None and not file.exists():
        folder = next(parent for parent in file.parents if parent.exists())
        if not os.access(folder, os.W_OK):
            return replace(seen, error=f"{folder} cannot be written")
        return replace(seen, note=f"{file.name} is not there yet; the first run makes it")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from orchestrator.record.mlflow_client import open_client  # MLflow takes seconds to import.

    steps = _Steps(open_client(config.uri), config)
    try:
        steps.use()
    except Exception as error:  # Whatever MLflow or its store's driver raises.
        seen = replace(seen, error=_line(error), status=_status(error), doing=steps.doing)
    finally:
        left = steps.tidy()
    return replace(seen, seconds=time.monotonic() - began, server=_server_version(config.uri), left=left)


class _Steps:
    """What is tried, one after the other; `doing` says where it stands."""

    def __init__(self, client: "MlflowClient", config: TrackingConfig) -> None:
        self.client, self.config = client, config
        self.doing = ""
        self._experiment = self._run = self._artifacts = ""
        self._folders: list[Path] = []

    def use(self) -> None:
        from mlflow.entities import Metric

        client = self.client
        self.doing = f"looking for the experiment {self.config.experiment}"
        found = client.get_experiment_by_name(self.config.experiment)
        if found is None:
            self.doing = "making an experiment"
            from orchestrator.record.mlflow_client import beside

            place = beside(self.config.uri)  # As a run's own experiment has it.
            self._experiment = client.create_experiment(f"raymuon-doctor-{secrets.token_hex(4)}", place)
        self.doing = "making a run"
        run = client.create_run(found.experiment_id if found else self._experiment, run_name="raymuon-doctor")
        self._run = run.info.run_id
        self.doing = "logging a metric"
        client.log_batch(self._run, metrics=[Metric("doctor", 1.0, int(time.time() * 1000), 0)])
        if [metric.value for metric in client.get_metric_history(self._run, "doctor")] != [1.0]:
            raise StorageError("a metric was not read back as it was logged")
        self.doing = "writing an artifact"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, ARTIFACT)
            file.write_text("written by raymuon doctor\n")
            self._artifacts = run.info.artifact_uri or ""
            self._folders = _missing_folders(self._artifacts)
            client.log_artifact(self._run, str(file))
        if ARTIFACT not in [artifact.path for artifact in client.list_artifacts(self._run)]:
            raise StorageError("an artifact is not listed after it was written")

    def tidy(self) -> str:
        """Delete what was made; return what could not be."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        left = []
        if self._artifacts:
            try:
                get_artifact_repository(self._artifacts, tracking_uri=self.config.uri).delete_artifacts(ARTIFACT)
            except Exception as error:
                left.append(f"{self._artifacts}/{ARTIFACT} ({_line(error)})")
            with suppress(OSError):  # Something is in one of them by now.
                for empty in self._folders:
                    empty.rmdir()
        for what, made, delete in (
            ("run", self._run, self.client.delete_run),
            ("experiment", self._experiment, self.client.delete_experiment),
        ):
            if made:
                try:
                    delete(made)
                except Exception as error:
                    left.append(f"{what} {made} ({_line(error)})")
        return "; ".join(left)


def _missing_folders(artifacts: str) -> list[Path]:
    """Return the folders that MLflow will make for artifacts on a disk, the deepest first."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if not is_local_uri(artifacts):  # It may be a path, too: that of the experiment `Default` is one.
        return []
    folder = Path(local_file_uri_to_path(artifacts)).absolute()
    return [place for place in (folder, *folder.parents) if not place.exists()]


def _status(error: Exception) -> int:
    """Return the HTTP status of a refusal; 0 where that was not what went wrong."""
    from mlflow.exceptions import MlflowException

    status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
    return status if status in (401, 403) else 0


def _server_version(uri: str) -> str:
    """Return the server's version; empty where there is no server, or it does not tell."""
    if not uri.startswith("http"):
        return ""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with suppress(Exception):
        answer = http_request(get_default_host_creds(uri), "/version", "GET", timeout=5, max_retries=0)
        return answer.text.strip() if answer is not None and answer.status_code == 200 else ""
    return ""


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
