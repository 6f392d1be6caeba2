"""Real servers for tests, beside SeaweedFS: a Ray cluster, a lesser S3 store, and a bad line to one."""

import http.client
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from jobs.environment import variables
from jobs.stack.seaweed import BUCKET, KEY, SECRET, client, s3_environment
from jobs.stack.server import server


@contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """Run rclone's S3 server, which ignores conditions, and yield its endpoint."""
    (folder / BUCKET).mkdir()
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", str(folder)]
    command += ["--addr", "127.0.0.1:0", "--auth-key", f"{KEY},{SECRET}"]

    def ask(listening: list[int]) -> str:
        endpoint = f"http://127.0.0.1:{listening[0]}"
        assert client(endpoint).exists(BUCKET)
        return endpoint

    with server("rclone", [(command, ask)], folder.parent / "rclone.log") as endpoint:
        yield endpoint


Harm = Literal[500, 503, "late", "lost", "no reply"] | None
"""Of a request: it gets 500 or 503, is late, loses its connection before the server has it, or loses the reply."""


@contextmanager
def unreliable(endpoint: str, share: float, seed: int) -> Iterator[str]:
    """Run a proxy before an S3 server that harms a share of the requests; yield its endpoint."""
    dice, lock = random.Random(seed), threading.Lock()

    def harm(method: str, path: str) -> Harm:
        with lock:
            return dice.choice((500, 503, "late", "lost", "no reply")) if dice.random() < share else None

    with proxy(endpoint, harm) as url:
        yield url


@contextmanager
def proxy(endpoint: str, harm_of: Callable[[str, str], Harm]) -> Iterator[str]:
    """Run a proxy before a server; `harm_of` a request's method and path is what becomes of it; yield its endpoint."""
    host, port = endpoint.removeprefix("http://").split(":")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            harm = harm_of(self.command, self.path)
            if harm == "lost":
                self.close_connection = True
                return
            if harm in (500, 503):
                code = "SlowDown" if harm == 503 else "InternalError"
                self.reply(harm, {}, f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
                return
            if harm == "late":
                time.sleep(1.0)
            upstream = http.client.HTTPConnection(host, int(port), timeout=60)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if harm == "no reply":
                self.close_connection = True
            else:
                self.reply(answer.status, dict(answer.getheaders()), data)

        def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response_only(status)
            length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
            for name, value in {**headers, "Content-Length": length}.items():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def ray_cluster(num_cpus: int, environment: dict[str, str]) -> Iterator[str]:
    """Run a Ray cluster that outlives the drivers that join it; yield its address."""
    from ray.cluster_utils import Cluster

    # Workers inherit the node's environment, as on a cloud machine.
    with variables(**s3_environment(), **environment):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False})
    try:
        yield cluster.address
    finally:
        cluster.shutdown()
