"""Servers find a port themselves, and another one where somebody was faster."""

import socket
import sys
import urllib.request
from urllib.parse import urlsplit

import pytest

from jobs.stack.seaweed import BUCKET, client, seaweedfs
from jobs.stack.server import server
from workers.common.errors import StorageError


@pytest.fixture
def taken():
    """A port on which somebody else answers."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def http(port: int):
    def ask(listening: list[int]) -> str:
        url = f"http://127.0.0.1:{listening[0]}"
        urllib.request.urlopen(url, timeout=10)
        return url

    return [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)], ask


def test_where_a_port_is_taken_the_next_start_is_tried(tmp_path, taken):
    with server("a server", [http(taken), http(0)], tmp_path / "log") as url:
        assert urlsplit(url).port != taken
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=10)  # It has ended with the block.


def test_a_server_that_does_not_come_up_is_told_with_its_last_words(tmp_path, taken):
    with (
        pytest.raises(StorageError, match="a server did not come up:\n(.*\n)*.*Address already in use"),
        server("a server", [http(taken)], tmp_path / "log"),
    ):
        raise AssertionError
    command, ask = [sys.executable, "-c", "print('no such license'); raise SystemExit(1)"], http(0)[1]
    with (
        pytest.raises(StorageError, match="no such license"),
        server("a server", [(command, ask), http(0)], tmp_path / "log"),
    ):
        raise AssertionError("another port does not mend that")


def test_seaweedfs_goes_where_nobody_is(tmp_path, taken):
    with seaweedfs(tmp_path, port=taken) as endpoint:
        assert urlsplit(endpoint).port != taken and client(endpoint).exists(BUCKET)
