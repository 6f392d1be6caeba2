"""What evaluations find of a run, beside what its driver has recorded: metrics `eval/...` at a checkpoint's step.

Invariant: a figure stands once at each step, whoever evaluates how often. MLflow cannot take a value back, so the first
one stays, and another one is told. Rows carry the time at which the checkpoint was saved, as those of its step do; the
status of the run and the marks of its own series are nobody's affair here.
"""

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from mlflow.entities import Metric

from orchestrator.record.metrics import STDERR
from orchestrator.record.mlflow_client import open_client, tracking_errors
from orchestrator.record.results import PREFIX, evaluations

FOLDER = "evaluation"
"""Of the artifacts."""
TABLE = f"{FOLDER}/table.json"
SHOWN_TABLES = "mlflow.loggedArtifacts"
"""MLflow's tag that names the tables among a run's artifacts."""
PER_BATCH = 1000
"""What MLflow takes at a time."""


class EvaluationRecord:
    """The evaluations of one run.

    Args:
        uri: of the tracking server or database.
        run_id: of the run.

    Raises:
        StorageError: it does not answer.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        with tracking_errors(uri):
            self._client = open_client(uri)

    def add(self, step: int, at: float, values: Mapping[str, float]) -> dict[str, float]:
        """Record what has no value at this step yet; return what had, and which.

        Args:
            step: of the checkpoint.
            at: when it was saved, in seconds since the epoch.
            values: by `task/metric`.
        """
        known = {name: found[step] for name in values if step in (found := self.history(name))}
        new = [
            Metric(metric_name(name), value, int(at * 1000), step)
            for name, value in values.items()
            if name not in known
        ]
        with tracking_errors(self.uri):
            for first in range(0, len(new), PER_BATCH):
                self._client.log_batch(self.run_id, metrics=new[first : first + PER_BATCH])
        return known

    def history(self, name: str) -> dict[int, float]:
        """Return the value at each step of a `task/metric`."""
        with tracking_errors(self.uri):
            found = self._client.get_metric_history(self.run_id, metric_name(name))
        return {one.step: one.value for one in found}

    def keep(self, task: str, step: int, details: Mapping[str, Any]) -> None:
        """Keep what is known of a task's result, once."""
        path = PurePosixPath(FOLDER, _plain(task), f"step-{step:08d}.json")
        with tracking_errors(self.uri):
            there = self._client.list_artifacts(self.run_id, str(path.parent))
            if str(path) not in {one.path for one in there}:
                self._client.log_text(self.run_id, json.dumps(details, indent=1, default=str), str(path))

    def write_table(self) -> None:
        """Make the table of all that is on record, a row for each step and figure, which MLflow's UI shows."""
        rows = [
            [step, *name.split("/", 1), value, found.get(f"{name}{STDERR}")]
            for step, found in sorted(evaluations(self.uri, self.run_id).items())
            for name, value in found.items()
            if not name.endswith(STDERR)
        ]
        table = {"columns": ["step", "task", "metric", "value", "standard error"], "data": rows}
        with tracking_errors(self.uri):
            self._client.log_text(self.run_id, json.dumps(table), TABLE)
            shown = json.loads(self._client.get_run(self.run_id).data.tags.get(SHOWN_TABLES, "[]"))
            if (mine := {"path": TABLE, "type": "table"}) not in shown:
                self._client.set_tag(self.run_id, SHOWN_TABLES, json.dumps([*shown, mine]))


def metric_name(name: str) -> str:
    """Return what MLflow calls a `task/metric`."""
    return f"{PREFIX}{'/'.join(map(_plain, name.split('/', 1)))}"


def _plain(name: str) -> str:
    """Return a name of characters that MLflow takes; a slash would begin another group."""
    return re.sub(r"[^\w. -]", "_", name)
