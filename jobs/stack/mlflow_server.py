"""An MLflow server as infra/kubernetes has it, on this machine: passwords, and artifacts that go through it to S3."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from workers.common.errors import ConfigError, StorageError

ADMIN = "admin"
START_S = 300.0

AUTH_CONFIG = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/mlflow-users.db
admin_username = {admin}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@contextmanager
def mlflow_server(folder: Path, port: int, artifacts: str, password: str, secrets: Mapping[str, str]) -> Iterator[str]:
    """Run an MLflow server with its database in `folder`, and yield its URL.

    Args:
        folder: for the database, the users and the log.
        port: on loopback.
        artifacts: URL of the folder that artifacts go to.
        password: of the user ADMIN.
        secrets: environment that gives the server the keys of that folder.

    Raises:
        ConfigError: what it needs is not installed.
        StorageError: it does not come up.
    """
    check_installed()
    auth = folder / "basic_auth.ini"
    auth.write_text(AUTH_CONFIG.format(folder=folder, admin=ADMIN))
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", artifacts]
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
    log = folder / "mlflow.log"
    with log.open("w") as output:
        # A session of its own: its workers get no Ctrl-C from our terminal, and end with it.
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _await(server, url, log)
        yield url
    finally:
        with suppress(ProcessLookupError):  # It may have ended by itself.
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(10)


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


def _await(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10)
            return
        except (OSError, urllib.error.URLError):
            time.sleep(0.3)
    raise StorageError(f"the MLflow server did not come up:\n{log.read_text()[-2000:]}")
