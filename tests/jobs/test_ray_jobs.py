"""Ray's job client goes where it is told, and with what it is told."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import ray


def test_the_environment_changes_neither_the_head_nor_the_way_nor_the_token(tmp_path):
    """In a process of its own: Ray reads its token mode once."""
    asked: list[tuple[str, str | None]] = []

    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200 if asked[-1][1] else 401)
            body = json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password else\n")
    netrc.chmod(0o600)
    nobody = "http://127.0.0.1:9"
    others = dict.fromkeys(("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "HTTP_PROXY", "http_proxy"), nobody)
    environment = {**os.environ, **others, "NETRC": str(netrc), "RAY_AUTH_TOKEN": "ours"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Head)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code = f"from jobs.ray_jobs import Jobs; Jobs('http://127.0.0.1:{server.server_port}')"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    finally:
        server.shutdown()
        server.server_close()
    look, *with_token = asked
    assert look == ("/api/version", None)
    assert len(with_token) >= 2, "our own second look, and Ray's client"
    assert set(with_token) == {("/api/version", "Bearer ours")}
