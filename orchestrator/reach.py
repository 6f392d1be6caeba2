"""Whether anybody listens at an address, found out in seconds: the clients of MLflow and Ray would try for minutes."""

import configparser
import os
import socket
import sqlite3
from contextlib import closing, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlparse

import requests
from requests.utils import get_environ_proxies, select_proxy

from orchestrator.config import SQLITE, database
from workers.common.errors import ConfigError, StorageError

REACH_S = 5.0
"""How long a server may take to accept a connection."""
ANSWER_S = 10.0
"""How long it may take to answer; one that is busy then is there."""
KNOWN = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "file")
"""Schemes of tracking stores that MLflow has itself."""
FOLDERS = "MLFLOW_ALLOW_FILE_STORE"
"""MLflow's variable with which it keeps runs in a folder as of old."""
NOBODY = (407, 502, 503, 504)
"""What a proxy answers that does not reach the server, or that does not let us through."""


def reach(host: str, port: int) -> None:
    """Connect and hang up.

    Raises:
        OSError: nobody answered.
    """
    socket.create_connection((host, port), timeout=REACH_S).close()


def reach_tracking(uri: str, experiment: str = "") -> None:
    """Find out within seconds whether the tracking server answers, where there is one.

    It is asked as MLflow's client asks: by the same library, through the environment's proxies, with the same
    certificates and credentials.

    Args:
        uri: of the server or database.
        experiment: where a run is to go; empty for none.

    Raises:
        ConfigError: MLflow has no such store, or the experiment was deleted.
        StorageError: the server does not answer.
    """
    scheme = _scheme(uri)
    found: dict[str, Any] = {}
    if scheme in ("http", "https"):
        found = _ask(uri, experiment)
    elif experiment and uri.startswith(SQLITE):
        found = _look(uri, experiment)
    elif scheme in ("", "file") and uri != "databricks" and os.environ.get(FOLDERS, "").lower() != "true":
        raise ConfigError(
            f"tracking.uri={uri}: MLflow keeps no new runs in folders; write {SQLITE}PATH, http://HOST:5000, or set "
            f"{FOLDERS}=true"
        )
    if found.get("lifecycle_stage") == "deleted":
        raise deleted_experiment(uri, experiment, str(found.get("experiment_id")))


def deleted_experiment(uri: str, name: str, number: str) -> ConfigError:
    """Return the refusal of an experiment that was deleted and not purged: its name is still taken."""
    return ConfigError(
        f"tracking.experiment={name}: that experiment was deleted in {uri}; bring it back with "
        f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number}, or name another one"
    )


def _scheme(uri: str) -> str:
    """Return the scheme of a tracking URI, empty for a path.

    Raises:
        ConfigError: MLflow does not know it.
    """
    scheme, colon, rest = uri.partition(":")
    if uri == "databricks" or not colon or "/" in scheme:
        return ""
    name = scheme.partition("+")[0].lower()  # `postgresql+psycopg2` names a driver, too.
    plugins = {point.name for point in entry_points(group="mlflow.tracking_store")}
    if name not in {*KNOWN, *plugins}:
        guess = f"; did you mean http://{uri}?" if rest.partition("/")[0].isdigit() else ";"
        raise ConfigError(
            f"tracking.uri={uri}: MLflow knows no {scheme}:{guess} Known are {', '.join(sorted({*KNOWN, *plugins}))}, "
            f"for instance http://HOST:5000 or {SQLITE}PATH"
        )
    if name == "sqlite" and not uri.startswith(SQLITE):
        raise ConfigError(f"tracking.uri={uri}: write {SQLITE}PATH, with three slashes before the path")
    return name


def _ask(uri: str, experiment: str) -> dict[str, Any]:
    """Return what a server says of an experiment; nothing where it does not say."""
    url = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name"
    proxy = select_proxy(url, get_environ_proxies(url))
    if proxy:  # It may have a password in it.
        parsed = urlparse(proxy)
        proxy = f" through the proxy {parsed.hostname}:{parsed.port} of the environment (NO_PROXY names exceptions)"
    way = proxy or ""
    mend = "start it, or check the address" + (" and the proxy" if way else "")
    try:
        answer = requests.get(url, {"experiment_name": experiment}, timeout=(REACH_S, ANSWER_S), **_credentials())
    except requests.ReadTimeout:
        return {}  # It is there, and busy.
    except (requests.RequestException, ValueError) as error:  # A port that is none, or a name that cannot be one.
        raise StorageError(f"tracking.uri={uri}: no server answers there{way} ({_cause(error)}); {mend}") from error
    if answer.status_code in NOBODY:
        told = f"{answer.status_code} {answer.reason}"
        raise StorageError(f"tracking.uri={uri}: no server answers there{way} ({told}); {mend}")
    try:
        return answer.json()["experiment"] if answer.ok else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _credentials() -> dict[str, Any]:
    """Return what MLflow's client gives to `requests`; what is in ~/.netrc that finds by itself."""
    told, file = os.environ.get, configparser.ConfigParser()
    with suppress(RuntimeError):  # There may be no home.
        file.read(Path("~/.mlflow/credentials").expanduser())
    user = told("MLFLOW_TRACKING_USERNAME") or file.get("mlflow", "mlflow_tracking_username", fallback="")
    password = told("MLFLOW_TRACKING_PASSWORD") or file.get("mlflow", "mlflow_tracking_password", fallback="")
    headers, auth = {}, (user, password) if user and password else None
    if auth is None and (token := told("MLFLOW_TRACKING_TOKEN")):
        headers["Authorization"] = f"Bearer {token}"
    insecure = told("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    verify = False if insecure else told("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    return {"headers": headers, "auth": auth, "verify": verify, "cert": told("MLFLOW_TRACKING_CLIENT_CERT_PATH")}


def _cause(error: BaseException) -> str:
    """Return the innermost reason: `requests` and `urllib3` wrap it four times over."""
    while (inner := getattr(error, "reason", None) or (error.args and error.args[0])) and isinstance(
        inner, BaseException
    ):
        error = inner
    return str(error).rpartition(">: ")[2] or type(error).__name__


def _look(uri: str, experiment: str) -> dict[str, Any]:
    """Return what a database says of an experiment; nothing where it does not say, or not yet.

    Raises:
        StorageError: the file is none.
    """
    file = database(uri)
    if file is None or not file.exists():
        return {}
    query = "SELECT lifecycle_stage, experiment_id FROM experiments WHERE name = ?"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=REACH_S)) as opened:
            row = opened.execute(query, (experiment,)).fetchone()
    except sqlite3.Error as error:
        if not file.is_file() or error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise StorageError(f"tracking.uri={uri}: {file} is no SQLite database; name another file") from error
        return {}  # Without tables yet, or locked: MLflow tells.
    return {"lifecycle_stage": row[0], "experiment_id": row[1]} if row else {}
