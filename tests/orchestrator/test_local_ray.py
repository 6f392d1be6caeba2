import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.group.access import auth_token
from orchestrator.group.local_ray import SOCKET_BYTES, ready_for_local_ray
from orchestrator.reach import reach_tracking
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import _follow_keys

NAMES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_TMPDIR", "TMPDIR")


@pytest.fixture
def home(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(file) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_the_token_of_a_local_ray_is_its_owners_alone(home):
    file = home / ".ray" / "auth_token"
    umask = os.umask(0)
    try:
        threads = [threading.Thread(target=ready_for_local_ray) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.umask(umask)
    assert mode(file) == 0o600 and len(auth_token().secret) == 32
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]
    before = file.read_text()
    file.chmod(0o644)  # As Ray leaves it.
    ready_for_local_ray()
    assert mode(file) == 0o600 and file.read_text() == before


def test_ray_takes_the_token_that_we_have_made(home):
    ready_for_local_ray()
    code = (
        "from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled as ready\n"
        "from ray._raylet import AuthenticationTokenLoader\nready()\nloader = AuthenticationTokenLoader.instance()\n"
        "print(loader.get_raw_token())"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert told.stdout.split() == [auth_token().secret], told.stderr
    assert mode(home / ".ray" / "auth_token") == 0o600


def test_a_token_from_elsewhere_needs_no_home(home, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nobody")
    with pytest.raises(ConfigError, match=r"HOME=/proc/nobody: .*cannot be written .*set HOME .*RAY_AUTH_TOKEN"):
        ready_for_local_ray()
    for name, value in (("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_MODE", "disabled")):
        with monkeypatch.context() as set_:
            set_.setenv(name, value)
            ready_for_local_ray()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "missing"))
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH=.*no such file"):
        ready_for_local_ray()


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_that_ray_cannot_use_is_told_with_the_variable_that_mends_it(home, monkeypatch, variable):
    from ray._private.utils import validate_socket_filepath

    rest = "/ray/session_2026-11-25_04-52-58_123456_/sockets/plasma_store"
    fits = SOCKET_BYTES - len(rest) - len(str(os.getpid()))
    for length in (fits, fits + 1):
        folder = f"/tmp/{'x' * (length - len('/tmp/'))}"
        path = f"{folder}{rest}".replace("_/sockets", f"_{os.getpid()}/sockets")
        monkeypatch.setenv(variable, folder)
        if length == fits:
            validate_socket_filepath(path)  # Ray's own rule.
            ready_for_local_ray()
            Path(folder, "ray").rmdir()
            Path(folder).rmdir()
        else:
            with pytest.raises(OSError, match="107 bytes"):
                validate_socket_filepath(path)
            with pytest.raises(ConfigError, match=f"{variable}={folder}: .* 108 bytes.*set RAY_TMPDIR to a short path"):
                ready_for_local_ray()
    for folder, why in (("/proc/nobody", "No such file"), ("/dev/null", "Not a directory")):
        monkeypatch.setenv(variable, folder)
        with pytest.raises(ConfigError, match=f"{variable}={folder}: Ray cannot write there .*{why}.*set RAY_TMPDIR"):
            ready_for_local_ray()


def test_a_user_without_a_home_is_told_what_to_set(home, monkeypatch):
    """As in a container that runs as a number which /etc/passwd does not know."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    with pytest.raises(ConfigError, match=rf"HOME is not set, and user {os.getuid()} has no home: .*set HOME to a"):
        ready_for_local_ray()
    with pytest.raises(ConfigError, match="HOME is not set"):
        auth_token()
    with pytest.raises(StorageError, match="no server answers there"):  # Credentials lie in a home, too.
        reach_tracking("http://127.0.0.1:1")
    _follow_keys()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "one-word")
    ready_for_local_ray()


BARE = """
import time, psutil, ray
from orchestrator.group.cluster import connected
from orchestrator.stop import StopSignal
with connected("local", StopSignal()) as joined:
    started = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert joined.local and not joined.dashboard_url
    before = ray.get(ray.remote(lambda: "a task runs").remote())
print(before, sum("gcs_server" in one for one in started), len(started), *started, sep=chr(10))
"""


def test_a_local_ray_starts_what_is_needed_and_no_more(tmp_path):
    """What is left out is private to Ray: in another version of it, it may be there again."""
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True)
    task, heads, number, *started = done.stdout.splitlines()
    assert (task, heads) == ("a task runs", "1"), done.stderr
    known = ("gcs_server", "raylet/raylet", "runtime_env/agent", "RuntimeEnvAgent", "dashboard/agent", "DashboardAgent")
    assert [one for one in started if not any(name in one for name in known)] == []
    assert int(number) == 4, started
