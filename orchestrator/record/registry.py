"""MLflow's registry of models: exported checkpoints as versions of one model, found by alias."""

from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.exceptions import MlflowException

from orchestrator.record.tracking import Tracking


def register(
    tracking: Tracking, model: str, source: str, run_id: str, tags: Mapping[str, Any], aliases: Iterable[str]
) -> str:
    """Make the folder at `source` the next version of a registered model, and return its number.

    Args:
        tracking: the MLflow.
        model: name; made where there is none.
        source: URL of an exported model.
        run_id: of the run that trained it; left out where this server does not have it.
        tags: of the version.
        aliases: that name it from now on, and no other version any more.

    Raises:
        StorageError: the server is away, or refuses.
    """
    with tracking.reach():
        client = tracking.client
        try:
            client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        try:
            client.get_run(run_id)
            known: str | None = run_id
        except MlflowException:
            known = None
        texts = {key: str(value) for key, value in tags.items()}
        version = str(client.create_model_version(model, source, known, texts).version)
        for alias in aliases:
            client.set_registered_model_alias(model, alias, version)
        return version
