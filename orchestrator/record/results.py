"""What evaluations have put on a run's record, by the step of the checkpoint: metrics `eval/<task>/<metric>`."""

from collections import defaultdict

from orchestrator.reach import reach_tracking
from orchestrator.record.mlflow_client import open_client, run_of_id, tracking_errors

PREFIX = "eval/"


def evaluations(uri: str, run_id: str) -> dict[int, dict[str, float]]:
    """Return the results at each step, by `task/metric`; nothing where this MLflow does not have the run.

    Raises:
        StorageError: it does not answer.
    """
    reach_tracking(uri)
    found: dict[int, dict[str, float]] = defaultdict(dict)
    with tracking_errors(uri):
        client = open_client(uri)
        if (run := run_of_id(client, run_id)) is None:
            return {}
        for name in sorted(name for name in run.data.metrics if name.startswith(PREFIX)):
            for one in client.get_metric_history(run_id, name):
                found[one.step][name.removeprefix(PREFIX)] = one.value
    return dict(found)
