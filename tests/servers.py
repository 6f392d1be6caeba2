"""Real servers for tests: a Ray cluster and an S3 store, each in a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

KEY, SECRET = "test-access-key", "not-a-secret-of-anybody"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_port_pair() -> int:
    """Return a free port whose neighbour 10,000 above is free too: SeaweedFS puts its gRPC there."""
    while True:
        port = free_port()
        if port + 10_000 < 65_536:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port + 10_000)):
                    return port


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """Run SeaweedFS with one user and yield the endpoint of its S3 API."""
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    credentials = [{"accessKey": KEY, "secretKey": SECRET}]
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [{"name": "t", "credentials": credentials, "actions": actions}]}))
    port = free_port_pair()
    command = [str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-s3", f"-s3.port={port}", f"-s3.config={config}", "-volume.max=50"]
    command += ["-master.volumeSizeLimitMB=256", "-s3.port.lance=0", "-s3.port.iceberg=0"]
    for service in ("master", "volume", "filer"):
        command.append(f"-{service}.port={free_port_pair()}")
    log = (folder / "weed.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert server.poll() is None, (folder / "weed.log").read_text()[-3000:]
            try:
                s3(endpoint).mkdir("raymuon-test")
                break
            except Exception:
                time.sleep(0.2)
        else:
            raise AssertionError("SeaweedFS did not come up\n" + (folder / "weed.log").read_text()[-3000:])
        yield endpoint
    finally:
        server.kill()  # A clean stop takes it twenty seconds, and the folder goes with the test.
        server.wait(20)


def s3(endpoint: str) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)


def s3_environment() -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def ray_cluster(num_cpus: int) -> Iterator[str]:
    """Run a Ray cluster that outlives the drivers that join it; yield its address."""
    from ray.cluster_utils import Cluster

    os.environ.update(s3_environment())  # Workers inherit the node's environment, as on a cloud machine.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False})
    try:
        yield cluster.address
    finally:
        cluster.shutdown()
