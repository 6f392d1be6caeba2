"""`raymuon stack`: what a run in the cloud has, on one machine and as real.

Ray with token authentication and several nodes, an MLflow server with a password, an S3 store with keys.

Ray's dashboard, MLflow and S3 listen on loopback alone; Ray's nodes find each other at the machine's address, where
they ask for the token. All secrets are drawn anew and lie in one folder that only its owner can read. `env.sh` there
gives them to a shell. What lies in the folder is kept, so that a stack that is started there again has its runs.
"""

import json
import logging
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from jobs.stack.mlflow_server import ADMIN, mlflow_server
from jobs.stack.seaweed import BUCKET, seaweedfs
from orchestrator.stop import StopSignal
from workers.common.errors import ClusterError, ConfigError
from workers.common.storage import storage_errors

ENVIRONMENT = "env.sh"
"""The file that gives a shell all that it needs; when it is there, the stack is up."""
OTHERS = ("RAY_AUTH_TOKEN", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
"""What a shell may have for another cluster or store, and what comes before the stack's own."""
STORE_BYTES = 100 << 20
"""Of Ray's object store on each node; Ray takes no less than 75 MB, and raymuon hardly any."""


@dataclass(frozen=True)
class Stack:
    """Where a stack is, for whoever uses it."""

    dashboard: str
    """Where jobs are submitted to."""
    ray: str
    """Address for drivers."""
    tracking_uri: str
    s3_endpoint: str
    environment: dict[str, str]
    """What a client's process needs to reach all of it; with the secrets."""

    @property
    def overrides(self) -> list[str]:
        """The config of a run here, on top of any."""
        return [
            f"checkpoint.url=s3://{BUCKET}/runs",
            f"data.prepared_url=s3://{BUCKET}/data",
            f"tracking.uri={self.tracking_uri}",
            f"storage.s3_endpoint={self.s3_endpoint}",
        ]


@contextmanager
def local_stack(folder: Path, nodes: int, gpus: int, workers: int) -> Iterator[Stack]:
    """Run a stack until the block ends.

    Args:
        folder: for all its files.
        nodes: beside the head, which has no room for workers.
        gpus: logical ones of each node; 0 for none.
        workers: that a node has processors for.

    Raises:
        ConfigError: something that it needs is not installed.
        ClusterError: Ray does not come up.
        StorageError: the store or MLflow does not.
    """
    with storage_errors(str(folder)):
        (folder / "s3").mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        drawn, known = _secrets(folder / "secrets.json"), folder / "ports.json"
        # The folder's runs have them on record; they are others where somebody has taken those.
        ports = json.loads(known.read_text()) if known.exists() else {}
    for variable in OTHERS:
        os.environ.pop(variable, None)
    with ExitStack() as exits:
        endpoint = exits.enter_context(seaweedfs(folder / "s3", drawn["s3_key"], drawn["s3_secret"], ports.get("s3")))
        keys = {
            "AWS_ACCESS_KEY_ID": drawn["s3_key"],
            "AWS_SECRET_ACCESS_KEY": drawn["s3_secret"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        uri = exits.enter_context(
            mlflow_server(
                folder,
                f"s3://{BUCKET}/mlflow",
                drawn["mlflow_password"],
                {**keys, "MLFLOW_S3_ENDPOINT_URL": endpoint},
                ports.get("mlflow", 0),
            )
        )
        _write(known, json.dumps({"s3": urlsplit(endpoint).port, "mlflow": urlsplit(uri).port}))
        token = folder / "ray-token"
        token.touch(0o600)
        token.write_text(drawn["ray_token"])
        environment = {
            **keys,
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": drawn["mlflow_password"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        ray_address, dashboard = exits.enter_context(_ray(environment, nodes, gpus, workers))
        environment["RAY_API_SERVER_ADDRESS"] = dashboard
        stack = Stack(dashboard, ray_address, uri, endpoint, environment)
        shell = folder / ENVIRONMENT
        exits.callback(shell.unlink, missing_ok=True)
        exports = [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
        _write(shell, "\n".join([f"unset {' '.join(OTHERS)}", *exports, ""]))
        yield stack


def stack(folder: str, nodes: int, gpus: int, workers: int) -> None:
    """Run a stack until Ctrl-C or SIGTERM, also without its terminal, and say how to use it."""
    from jobs.screen import Screen

    console, stop = Screen(stderr=True), StopSignal()
    stop.listen(at_once=False)  # Its servers would be left behind.
    console.print(f"starting S3, MLflow and Ray with {nodes} node(s) ...", style="dim")
    with local_stack(Path(folder).resolve(), nodes, gpus, workers) as up:
        console.print(f"MLflow         {up.tracking_uri}, as {ADMIN}; the password is in {ENVIRONMENT}")
        console.print(f"Ray dashboard  {up.dashboard}, with the token")
        console.print(f"S3             {up.s3_endpoint}, bucket {BUCKET}")
        console.print("\nIn another terminal:")
        console.print(f"  source {shlex.quote(str(Path(folder) / ENVIRONMENT))}")
        console.print(f"  raymuon submit demo {' '.join(up.overrides)} --follow")
        console.print(f"\nCtrl-C ends it, and so does kill {os.getpid()}; what it holds is kept.")
        while not stop.requests:
            time.sleep(0.2)
        console.print("ending ...", style="dim")


def _secrets(path: Path) -> dict[str, str]:
    """Return the folder's secrets; draw them where there are none."""
    if not path.exists():
        names = ("s3_key", "s3_secret", "mlflow_password", "ray_token")
        _write(path, json.dumps({name: secrets.token_hex(24) for name in names}))
    return json.loads(path.read_text())


def _write(path: Path, text: str) -> None:
    """Write a file that only its owner may read; whoever looks finds it whole or not at all."""
    unfinished = path.with_suffix(".new")
    unfinished.touch(0o600)
    unfinished.write_text(text)
    unfinished.replace(path)


@contextmanager
def _ray(environment: dict[str, str], nodes: int, gpus: int, workers: int) -> Iterator[tuple[str, str]]:
    """Run a Ray cluster whose nodes have the environment; yield its address and its dashboard's URL."""
    if "ray" in sys.modules:
        raise ConfigError("a stack has to be started before Ray is imported: Ray reads its token mode then")
    # Jobs call `python`, which has to be this one.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.update(environment)
    # A job that is stopped finishes its step and saves; Ray would kill it after 3 s.
    os.environ["RAY_JOB_STOP_WAIT_TIME_S"] = "120"
    from ray.cluster_utils import Cluster

    from orchestrator.group.cluster import signals_apart

    logging.getLogger("ray").setLevel(logging.ERROR)
    head = {
        "num_cpus": 0,
        "num_gpus": 0,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_agent_listen_port": 0,  # Other Rays on this machine may have Ray's own choice.
    }
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        # A job finds its cluster by what is noted there, and that is the newest: another stack's, or a replay's.
        os.environ["RAY_TMPDIR"] = folder
        cluster = Cluster()
        try:
            try:
                with signals_apart():
                    first = cluster.add_node(**head, **_node(0))
                    for number in range(1, nodes + 1):
                        cluster.add_node(num_cpus=max(workers, gpus), num_gpus=gpus, **_node(number))
            except Exception as error:  # Ray raises bare ones.
                raise ClusterError(f"Ray did not start on this machine: {error}") from error
            yield str(cluster.address), f"http://{first.webui_url}"
        finally:
            cluster.shutdown()


def _node(number: int) -> dict[str, Any]:
    return {
        "object_store_memory": STORE_BYTES,
        # A node's agent removes a job's working directory and unpacks it anew: in the folder that nodes of one machine
        # share, under the feet of the driver.
        "runtime_env_dir_name": f"runtime_resources-{number}",
    }
