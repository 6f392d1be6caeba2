import os
import subprocess
import sys

import pytest

from orchestrator.group.access import Access, auth_token, head_access
from workers.common.errors import ClusterError, ConfigError

# Ray's own authentication, before a route of the dashboard's name: a whole head takes ten seconds to start.
GATE = """
import socket
import sys
import aiohttp
from aiohttp import web
from ray._private.authentication.http_token_authentication import get_token_auth_middleware
async def version(request):
    return web.json_response({"ray_version": "2.60.0"})
async def away(request):
    raise web.HTTPFound(sys.argv[1] + "/api/version")
app = web.Application(middlewares=[get_token_auth_middleware(aiohttp)])
app.add_routes([web.get("/api/version", version), web.get("/away/api/version", away)])
socket = socket.create_server(("127.0.0.1", 0))
web.run_app(app, sock=socket, print=lambda *_: print(socket.getsockname()[1], flush=True))
"""


@pytest.fixture(scope="module")
def gates():
    """URLs of one that asks for the token `right`, and of one that asks for none."""
    started, urls = [], []
    for mode in ("token", "disabled"):
        command = [sys.executable, "-c", GATE, *urls]
        environment = {**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "right"}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
        urls.append(f"http://127.0.0.1:{int(started[-1].stdout.readline())}")
    yield urls
    for gate in started:
        gate.kill()
        gate.wait()


@pytest.fixture
def home(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_head_that_asks_and_one_that_does_not(gates, home, monkeypatch):
    asking, open_ = gates
    assert head_access(asking + "/") == Access(asking, True, True, None, ""), "we have no token"
    assert head_access(open_) == Access(open_, True, False, None, "2.60.0")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert head_access(asking) == Access(asking, True, True, False, "")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("right\n")
    assert head_access(asking).accepts_ours is False, "the variable comes first"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert head_access(asking) == Access(asking, True, True, True, "2.60.0")


def test_exposed_is_open_to_other_machines():
    assert Access("u", loopback=False, asks_for_token=False, accepts_ours=None, ray_version="2").exposed
    assert not Access("u", loopback=True, asks_for_token=False, accepts_ours=None, ray_version="2").exposed
    assert not Access("u", loopback=False, asks_for_token=True, accepts_ours=True, ray_version="2").exposed


def test_a_token_is_not_taken_along_by_a_redirect(gates, home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with pytest.raises(ClusterError, match="not a Ray dashboard .HTTP status 302"):
        head_access(gates[1] + "/away")


@pytest.mark.parametrize(
    ("url", "error", "told"),
    [
        ("127.0.0.1:8265", ConfigError, "write it like http://127.0.0.1:8265"),
        ("http://127.0.0.1:99999", ConfigError, "out of range"),
        ("http://127.0.0.1:1", ClusterError, "no Ray dashboard answers there"),
        ("http://no-such-host.invalid:8265", ClusterError, "name is not known"),
    ],
)
def test_nobody_there(url, error, told):
    with pytest.raises(error, match=told):
        head_access(url)


def test_a_token_file_that_others_may_read(home, monkeypatch):
    assert auth_token() is None
    (home / ".ray").mkdir()
    file = home / ".ray" / "auth_token"
    file.write_text("hush\n")
    for mode, readable in ((0o644, True), (0o620, True), (0o600, False)):
        file.chmod(mode)
        assert auth_token().readable_by_others is readable
    assert auth_token().secret == "hush" and "hush" not in repr(auth_token())
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "missing"))
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH=.*missing: no such file"):
        auth_token()


@pytest.mark.parametrize("variable", [True, False])
def test_what_is_no_token_is_refused_and_not_repeated(home, monkeypatch, variable):
    """Two lines in the file: urllib would refuse the header, and the head would be taken for no dashboard."""
    (home / ".ray").mkdir(exist_ok=True)
    (home / ".ray" / "auth_token").write_text("secret-one\nsecret-two\n")
    if variable:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-one secret-two")
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN: a token" if variable else "auth_token: a token") as refusal:
        auth_token()
    assert "secret" not in str(refusal.value)
