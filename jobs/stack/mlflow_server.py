"""An MLflow server as infra/kubernetes has it, on this machine: passwords, and artifacts that go through it to S3."""

import os
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jobs.stack.server import server
from workers.common.errors import ConfigError

ADMIN = "admin"

AUTH_CONFIG = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/mlflow-users.db
admin_username = {admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@contextmanager
def mlflow_server(
    folder: Path, artifacts: str, password: str, secrets: Mapping[str, str], port: int = 0
) -> Iterator[str]:
    """Run an MLflow server with its database in `folder`, and yield its URL.

    Args:
        folder: for the database, the users and the log.
        artifacts: URL of the folder that artifacts go to.
        password: of the user ADMIN.
        secrets: environment that gives the server the keys of that folder.
        port: on loopback, where it is free; otherwise, and for 0, any that is.

    Raises:
        ConfigError: what it needs is not installed.
        StorageError: it does not come up.
    """
    check_installed()
    auth = folder / "basic_auth.ini"
    auth.write_text(AUTH_CONFIG.format(folder=folder, admin=ADMIN))
    environment = {
        # Whatever the shell has for clients, or for another server, is not this one's.
        **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        **secrets,
        "MLFLOW_AUTH_CONFIG_PATH": str(auth),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.urandom(32).hex(),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", artifacts]
    starts = [([*command, "--port", str(number)], _health) for number in dict.fromkeys((port, 0))]
    with server("the MLflow server", starts, folder / "mlflow.log", environment, gently=True) as url:
        yield url


def _health(listening: list[int]) -> str:
    """Return the server's URL."""
    (port,) = set(listening)
    url = f"http://127.0.0.1:{port}"
    urllib.request.urlopen(f"{url}/health", timeout=10)
    return url


def check_installed() -> None:
    """Refuse to begin without what the server imports.

    Raises:
        ConfigError: something is missing.
    """
    try:
        import boto3  # noqa: F401
        import flask_wtf  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the MLflow server needs {error.name}; run: pip install 'raymuon[stack]'") from error
