"""The tracking server is asked the way that MLflow's client goes: a real server, and a real forward proxy before it."""

import http.client
import socket
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.cli import cli
from mlflow.server import get_app_client

from jobs.stack.mlflow_server import ADMIN, mlflow_server
from orchestrator.config import TrackingConfig
from orchestrator.reach import reach_tracking
from orchestrator.record.tracking import Tracking, look_up
from workers.common.errors import ConfigError, StorageError

PASSWORD = "a-password-of-the-tests"
VARIABLES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(folder, str(folder / "artifacts"), PASSWORD, {}) as uri:
        yield uri


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """No proxy, nobody's home, and the password."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return monkeypatch


@contextmanager
def forward_proxy(to: str, status: int | None = None):
    """Run a proxy that knows one server, whatever it is called; or answers `status`. Yield its URL and what it saw."""
    target, seen = urlsplit(to), []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            seen.append(self.path)
            if status is not None:
                self.send_error(status)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            upstream = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
            parts = urlsplit(self.path)
            path = f"{parts.path}?{parts.query}" if parts.query else parts.path
            headers = {**self.headers, "Host": target.netloc}  # A server takes no other's name.
            upstream.request(self.command, path, body, headers)
            reply = upstream.getresponse()
            data = reply.read()
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.headers.get("Content-Type", ""))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = answer  # noqa: N815

        def log_message(self, *_):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", seen
    finally:
        proxy.shutdown()
        proxy.server_close()


BEHIND = "http://mlflow.behind-the-proxy.invalid:5000"


def test_a_server_that_only_the_proxy_reaches_is_reached(server, environment):
    with pytest.raises(StorageError, match="no server answers there .*; start it, or check the address$"):
        reach_tracking(BEHIND, "there")
    with forward_proxy(server) as (url, seen):
        environment.setenv("HTTP_PROXY", url)
        reach_tracking(BEHIND, "there")
        assert len(seen) == 1
        Tracking(TrackingConfig(uri=BEHIND, experiment="there"))  # As the client does.
        environment.setenv("NO_PROXY", "127.0.0.1,mlflow.behind-the-proxy.invalid")
        seen.clear()
        with pytest.raises(StorageError, match="no server answers there"):
            reach_tracking(BEHIND)
        reach_tracking(server, "there")
        assert seen == []


@pytest.mark.parametrize("status", [407, 502, 503, 504])
def test_a_proxy_that_does_not_reach_the_server_is_named_without_its_password(server, environment, status):
    with forward_proxy(server, status) as (url, _):
        environment.setenv("http_proxy", url.replace("//", "//user:hush@"))
        told = (
            rf"no server answers there through the proxy 127.0.0.1:\d+ .*\({status} .*check the address and the proxy"
        )
        with pytest.raises(StorageError, match=told) as refusal:
            reach_tracking(BEHIND)
        assert "hush" not in str(refusal.value)
    with pytest.raises(StorageError, match=r"through the proxy 127.0.0.1:\d+ .*refused"):
        reach_tracking(BEHIND)  # It is not up any more.


@pytest.mark.parametrize("place", ["server", "sqlite"])
def test_a_deleted_experiment_is_told_with_what_brings_it_back(place, server, environment, tmp_path):
    uri = server if place == "server" else f"sqlite:///{tmp_path}/a b#%.db"
    name = "it's gone / 100 %"
    tracking = Tracking(TrackingConfig(uri=uri, experiment=name))
    reach_tracking(uri, name)
    tracking.client.delete_experiment(tracking.experiment_id)
    number = tracking.experiment_id
    with pytest.raises(
        ConfigError, match=f"tracking.experiment={name}: .* restore --experiment-id {number}, or"
    ) as told:
        reach_tracking(uri, name)
    with pytest.raises(ConfigError, match="was deleted"):
        Tracking(TrackingConfig(uri=uri, experiment=name))
    # The advice, word for word.
    command = str(told.value).partition("bring it back with ")[2].partition(", or")[0]
    assignment, _, rest = command.partition(" mlflow ")
    done = CliRunner().invoke(cli, rest.split(), env=dict([assignment.split("=", 1)]))
    assert done.exit_code == 0, done.output
    reach_tracking(uri, name)
    assert Tracking(TrackingConfig(uri=uri, experiment=name)).experiment_id == number


def test_credentials_are_those_of_the_client(server, environment, tmp_path):
    """Without them the deleted experiment could not be seen: they are taken from all places that the client knows."""
    tracking = Tracking(TrackingConfig(uri=server, experiment="secret"))
    tracking.client.delete_experiment(tracking.experiment_id)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        environment.delenv(name)
    reach_tracking(server, "secret")  # Refused: the client will tell.
    (tmp_path / ".mlflow").mkdir()
    file = tmp_path / ".mlflow" / "credentials"
    file.write_text(f"[mlflow]\nmlflow_tracking_username = {ADMIN}\nmlflow_tracking_password = {PASSWORD}\n")
    with pytest.raises(ConfigError, match="was deleted"):
        reach_tracking(server, "secret")
    file.unlink()
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login {ADMIN} password {PASSWORD}\n")
    (tmp_path / ".netrc").chmod(0o600)
    with pytest.raises(ConfigError, match="was deleted"):
        reach_tracking(server, "secret")


def test_a_server_that_is_busy_is_there(environment, monkeypatch):
    monkeypatch.setattr("orchestrator.reach.ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reach_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}", "x")


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("http://127.0.0.1:1", None),
        ("http://127.0.0.1:99999", None),
        ("http://no-such-host.invalid:5000", None),
        (
            "localhost:5000",
            "MLflow knows no localhost:; did you mean http://localhost:5000. Known are databricks, file,",
        ),
        ("htp://host:5000", "MLflow knows no htp:; Known are .*http, .*postgresql"),
        ("redis://host/0", "MLflow knows no redis:"),
        ("sqlite://mlflow.db", "three slashes"),
        ("sqlite:mlflow.db", "three slashes"),
    ],
)
def test_who_cannot_be_there_is_told_at_once(environment, uri, told):
    with pytest.raises(ConfigError if told else StorageError, match=told or "no server answers there"):
        reach_tracking(uri)


@pytest.mark.parametrize(
    "uri",
    ["runs/mlruns", "file:///x/mlruns", "databricks", "databricks://me", "postgresql+psycopg2://h/x", "mysql://h/x"],
)
def test_what_mlflow_itself_has_to_try_passes(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    reach_tracking(uri, "x")


@pytest.mark.parametrize("uri", ["runs/mlruns", "file:///x/mlruns", "file:mlruns", "/x", ".", ""])
def test_a_folder_which_mlflow_will_refuse_is_refused_at_once(uri, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match="MLflow keeps no new runs in folders; write sqlite:///PATH"):
        reach_tracking(uri)


@pytest.mark.parametrize("content", [b"some text, long enough for a page " * 200, b"short", None])
def test_what_is_no_database_is_told_at_once(tmp_path, content):
    file = tmp_path / "a b.db"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(StorageError, match="is no SQLite database; name another file"):
        reach_tracking(f"sqlite:///{file}", "x")
    fresh = tmp_path / "fresh.db"
    fresh.write_bytes(b"")  # As an interrupted start leaves it.
    reach_tracking(f"sqlite:///{fresh}", "x")


def test_the_known_schemes_are_those_of_mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    for scheme in _tracking_store_registry._registry:
        if scheme and scheme not in ("databricks-uc", "uc"):  # Of models alone.
            reach_tracking(f"{scheme}:///x" if scheme not in ("http", "https") else "databricks")
    assert mlflow.__version__


def test_a_run_is_found_by_its_name_by_whoever_is_no_admin(server, environment):
    get_app_client("basic-auth", server).create_user("member", PASSWORD)
    environment.setenv("MLFLOW_TRACKING_USERNAME", "member")
    tracking = Tracking(TrackingConfig(uri=server, experiment="of-a-member"))
    run = tracking.create("mine", {"run.name": "mine"})
    assert look_up(server, "mine").info.run_id == look_up(server, run).info.run_id == run == tracking.find("mine")
    for ask in (tracking.find, partial(look_up, server)):
        with pytest.raises(ConfigError, match="no run of that id or name"):
            ask("nobody's")
    environment.setenv("MLFLOW_TRACKING_PASSWORD", "a-wrong-one")  # Not to be taken for a run that is not there.
    with pytest.raises(StorageError, match="authenticated|401"):
        look_up(server, "mine")
