"""MLflow's registry of models: exported checkpoints as versions of one model, found by alias."""

from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.exceptions import MlflowException

from orchestrator.record.mlflow_client import run_of_id
from orchestrator.record.tracking import Tracking
from workers.common.errors import ConfigError


def ask(tracking: Tracking, model: str) -> None:
    """Find out whether models are registered there, and under such a name; nothing is made.

    Raises:
        ConfigError: MLflow does not take the name.
        StorageError: the server is away, or refuses.
    """
    with tracking.reach():
        try:
            tracking.client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise ConfigError(f"--register {model!r}: {error.message}") from error
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise


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
        known = run_id if run_of_id(client, run_id) else None
        texts = {key: str(value) for key, value in tags.items()}
        version = str(client.create_model_version(model, source, known, texts).version)
        for alias in aliases:
            client.set_registered_model_alias(model, alias, version)
        return version
