"""The MLflow run: owned by the driver, written by one thread, each step once.

A high-water mark per series, read back on resume, keeps a step that is trained again after a fault from being logged
again. Rows carry the time at which the step happened. An unreachable server never stops training: rows wait in memory
and go out with the next flush; `close` raises if some could not be written at all.
"""

import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LifecycleStage, Metric, Param, Run, RunStatus
from mlflow.exceptions import MlflowException

from orchestrator.config import TrackingConfig, database
from orchestrator.reach import deleted_experiment
from orchestrator.record.metrics import published, read_history
from orchestrator.record.mlflow_client import beside, file_of, open_client, run_of_id, tracking_errors
from workers.common.errors import ConfigError, StorageError

FLUSH_S = 2.0
METRICS_PER_BATCH = 1000
"""What MLflow takes at a time; a row is never torn."""
MARKS = {"train": "loss", "validation": "val_loss"}
"""The metric of each series whose last step is the series' high-water mark."""
PARAM_LIMIT = 6000
MOST_EXPERIMENTS = 10_000
LOOKED_AT = 20
"""Runs of a name, from the newest on."""
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Of our experiment: MLflow's UI shows it as training, not as the evaluation of an application."""
AS_TRAINING = "workflowType=machine_learning"
"""Of the address of a page: from 3.17 on the UI asks its address and the browser, and not the experiment."""
SUBMITTED = "raymuon.submitted"
"""The tag of a run that was made before its first driver."""


class Tracking:
    """An MLflow tracking server or database.

    Raises:
        StorageError: it refuses us.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self.uri = config.uri
        with tracking_errors(config.uri):
            self.client = open_client(config.uri)
            self.experiment_id = self._experiment(config)
        self._file = file_of(config.uri)

    @contextmanager
    def reach(self) -> Iterator[None]:
        """Tell in a line what goes wrong inside, and before that whether the database is still the one we have opened.

        SQLite would make an empty one in its place, or write on into a file that has no name any more.

        Raises:
            StorageError: something went wrong.
        """
        with tracking_errors(self.uri):
            if (now := file_of(self.uri)) != self._file:
                gone = "is gone" if not now else "is another file now"
                raise StorageError(
                    f"the database {gone}; put it back and the rows that wait are written. Checkpoints and the journal "
                    "beside them have everything"
                )
            yield

    def create(
        self, name: str, params: Mapping[str, Any], begins: bool = True, tags: Mapping[str, str] | None = None
    ) -> str:
        """Make a run and return its id; the params are logged once, with the run.

        Args:
            name: for people.
            params: of the run.
            begins: it begins now; otherwise a job, or a study, will begin it, and it is marked so.
            tags: that it has from its first moment on.
        """
        logged = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in params.items()]
        with self.reach():
            run_id = self.client.create_run(self.experiment_id, tags=dict(tags or {}), run_name=name).info.run_id
            try:
                self.client.log_batch(run_id, params=logged)
                if not begins:
                    self.client.set_tag(run_id, SUBMITTED, "true")
                    self.client.update_run(run_id, status=RunStatus.to_string(RunStatus.SCHEDULED))
            except Exception:
                self.client.delete_run(run_id)  # No half run.
                raise
        return run_id

    def discard(self, run_id: str) -> None:
        """Delete a run that nothing will come of."""
        with self.reach():
            self.client.delete_run(run_id)

    def page(self, run_id: str) -> str:
        """Return the path at which the UI shows a run's charts, as those of a training."""
        with self.reach():
            experiment = self.client.get_run(run_id).info.experiment_id
        return f"#/experiments/{experiment}/runs/{run_id}/model-metrics?{AS_TRAINING}"

    def submitted(self, run_id: str) -> bool:
        """Tell whether a run was made before its first driver."""
        with self.reach():
            return SUBMITTED in self.client.get_run(run_id).data.tags

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        with self.reach():
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)

    def keep(self, run_id: str, name: str, text: str) -> None:
        """Make a text an artifact of a run."""
        with self.reach():
            self.client.log_text(run_id, text, name)

    def attach(self, run_id: str, folder: Path, name: str) -> None:
        """Put the files of a local folder beside a run, into a folder there."""
        with self.reach():
            self.client.log_artifacts(run_id, str(folder), name)

    def unfinished(self, name: str) -> str | None:
        """Return the newest run of that name which has not finished."""
        return self._newest(f"attributes.run_name = {_quoted(name)} and attributes.status != 'FINISHED'")

    def newest_finished(self, name: str) -> str | None:
        """Return the newest run of that name which has finished."""
        return self._newest(f"attributes.run_name = {_quoted(name)} and attributes.status = 'FINISHED'")

    def is_finished(self, run_id: str) -> bool:
        """Tell whether a run is on record as finished."""
        with self.reach():
            return self.client.get_run(run_id).info.status == "FINISHED"

    def find(self, run: str) -> str:
        """Return the id of the run with this id, or the newest with this name.

        Raises:
            ConfigError: there is none.
        """
        with tracking_errors(self.uri):
            known = run_of_id(self.client, run)
        found = known.info.run_id if known else self._newest(f"attributes.run_name = {_quoted(run)}")
        if found is None:
            raise ConfigError(
                f"--resume {run}: no run of that id or name in {self.uri}; name one, or use auto or never"
            )
        return found

    def _newest(self, condition: str) -> str | None:
        with self.reach():
            run = _newest(self.client, [self.experiment_id], condition)
        return run and run.info.run_id

    def _experiment(self, config: TrackingConfig) -> str:
        found = self.client.get_experiment_by_name(config.experiment)
        if found is None:
            # A server has its own place for artifacts; beside a database file they go into a folder next to it.
            artifacts = beside(config.uri)
            try:
                return self.client.create_experiment(config.experiment, artifacts, tags=KIND)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self.client.get_experiment_by_name(config.experiment)  # Another driver was faster.
        assert found is not None
        if found.lifecycle_stage != LifecycleStage.ACTIVE:
            raise deleted_experiment(config.uri, config.experiment, found.experiment_id)
        return found.experiment_id


def look_up(uri: str, run: str) -> Run:
    """Return the run with this id, or the newest with this name in any experiment; nothing is made.

    Raises:
        ConfigError: there is none.
        StorageError: the store does not answer.
    """
    hint = "name the server or database that has it with --tracking-uri"
    if (file := database(uri)) is not None and not file.exists():
        raise ConfigError(f"run {run}: there is no MLflow database at {uri}; {hint}")
    with tracking_errors(uri):
        client = open_client(uri)
        if (known := run_of_id(client, run)) is not None:
            return known
        everywhere = [one.experiment_id for one in client.search_experiments(max_results=MOST_EXPERIMENTS)]
        found = _newest(client, everywhere, f"attributes.run_name = {_quoted(run)}")
    if found is None:
        raise ConfigError(f"run {run}: {uri} has no run of that id or name; {hint}")
    return found


def _newest(client: mlflow.MlflowClient, experiments: list[str], condition: str) -> Run | None:
    """Return the newest run that has params.

    One without is of a request that MLflow's client has repeated because the first answer was late; nobody knows of it.
    """
    newest_first = ["attributes.start_time DESC"]
    found = client.search_runs(experiments, condition, max_results=LOOKED_AT, order_by=newest_first)
    return next((run for run in found if run.data.params), None)


def read_artifact(uri: str, run_id: str, name: str) -> str:
    """Return the text of a run's artifact.

    Raises:
        StorageError: there is none, or the store does not answer.
    """
    with tracking_errors(uri), tempfile.TemporaryDirectory() as folder:
        return Path(open_client(uri).download_artifacts(run_id, name, folder)).read_text()


@dataclass
class _Row:
    step: int
    time_ms: int
    values: dict[str, float]


class RunRecord:
    """One MLflow run while a driver leads it.

    Args:
        tracking: where the run is.
        run_id: the run; it is marked as running.
    """

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self.client, self.reach, self.run_id = tracking.client, tracking.reach, run_id
        self.marks = {
            series: max((step for step, _ in self.history(metric)), default=-1) for series, metric in MARKS.items()
        }
        with self.reach():
            self.client.update_run(run_id, status=RunStatus.to_string(RunStatus.RUNNING))
        self._rows: list[_Row] = []
        self._tags: dict[str, str] = {}
        self._lock = threading.Lock()  # Guards _rows; _flushing keeps the order of the rows that are on their way.
        self._flushing = threading.Lock()
        self._wake, self._closing = threading.Event(), False
        self._hurried: list[threading.Event] = []
        """Who waits for the next flush."""
        self.failure: str | None = None
        """Why the last flush failed, if it did."""
        self.most_waiting = 0
        """The most rows that have ever waited."""
        self.written_at = 0.0
        """When MLflow last took rows, in seconds since the epoch."""
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, series: str, step: int, at: float, values: dict[str, float]) -> None:
        """Record a step of `train` or `validation` at most once; `at` in seconds since the epoch."""
        if step > self.marks[series]:
            self.marks[series] = step
            self.note(step, at, values)

    def note(self, step: int, at: float, values: dict[str, float]) -> None:
        """Record something that happened besides the series, as often as it happens."""
        with self._lock:
            self._rows.append(_Row(step, int(at * 1000), values))
            self.most_waiting = max(self.most_waiting, len(self._rows))

    def flush(self) -> bool:
        """Write all rows that wait; on a failure keep them, note why, and return False."""
        with self._flushing:
            with self._lock:
                rows, tags = list(self._rows), dict(self._tags)
            try:
                for number, metrics in _batches(rows):
                    with self.reach():
                        self.client.log_batch(self.run_id, metrics=metrics)
                    self.written_at = time.time()
                    with self._lock:  # At once: a failure among many batches must not send them all again.
                        del self._rows[:number]
                with self.reach():
                    for key, value in tags.items():
                        self.client.set_tag(self.run_id, key, value)
            except StorageError as error:  # Training goes on.
                self.failure = str(error)
                return False
            self.failure = None
            with self._lock:
                self._tags = {key: value for key, value in self._tags.items() if tags.get(key) != value}
            return True

    def hurry(self, timeout_s: float) -> None:
        """Have the rows that wait written now, and wait for that; after `timeout_s` no longer.

        The driver calls this, and must not stand still because MLflow does.
        """
        written = threading.Event()
        with self._lock:
            self._hurried.append(written)
        self._wake.set()
        written.wait(timeout_s)

    def tag_later(self, key: str, value: str) -> None:
        """Set a tag of the run with the next flush; of several values the last counts."""
        with self._lock:
            self._tags[key] = value

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        with self.reach():
            self.client.set_tag(self.run_id, key, value)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Put a file beside the run, into a folder there where one is named."""
        with self.reach():
            self.client.log_artifact(self.run_id, str(path), folder)

    def has_artifact(self, name: str) -> bool:
        """Tell whether a file of that name lies beside the run."""
        with self.reach():
            return any(artifact.path == name for artifact in self.client.list_artifacts(self.run_id))

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Return all `(step, value)` of a metric, in order."""
        with self.reach():
            return [(one.step, one.value) for one in read_history(self.client, self.run_id, metric)]

    def abandon(self) -> None:
        """Stop writing and leave the run as it is: it is led by somebody else."""
        with self._lock:
            self._rows.clear()
        self._end_thread()

    def close(self, status: str) -> None:
        """Write what is left and set the run's status: FINISHED, FAILED or KILLED.

        Raises:
            StorageError: rows could not be written.
        """
        self._end_thread()
        if not self.flush():
            raise StorageError(f"{len(self._rows)} rows could not be written to the MLflow run: {self.failure}")
        with self.reach():
            self.client.set_terminated(self.run_id, status)

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(FLUSH_S)
            self._wake.clear()
            with self._lock:
                hurried, self._hurried = self._hurried, []
            if not self._closing:
                self.flush()
            for written in hurried:
                written.set()

    def _end_thread(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()


def _batches(rows: Iterable[_Row]) -> Iterator[tuple[int, list[Metric]]]:
    """Yield how many rows are in a batch, and their metrics."""
    number, batch = 0, list[Metric]()
    for row in rows:
        if len(batch) + len(row.values) > METRICS_PER_BATCH:
            yield number, batch
            number, batch = 0, []
        number += 1
        batch += [Metric(published(key), value, row.time_ms, row.step) for key, value in row.values.items()]
    if number:
        yield number, batch


def _quoted(name: str) -> str:
    """Quote a name for MLflow's filter language, which has no escapes; RunInfo refuses names with a double quote."""
    return '"{}"'.format(name.replace('"', ""))
