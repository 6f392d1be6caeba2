"""A keeper is reached at whatever address its node has."""

import socket

import pytest

from orchestrator.group.keeper import Keeper
from workers.common.wire import Connection
from workers.config import StorageConfig


def _has(host: str) -> bool:
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address, family=family):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_keeper_answers_at_an_address_of_either_family(host):
    if not _has(host):
        pytest.skip(f"this machine has no {host}")
    keeper = Keeper(host, "t" * 32, StorageConfig())
    assert keeper.address().host == host
    connection = Connection.open(keeper.address())
    answer = connection.request({"op": "read", "path": "none", "half": 0, "step": 1, "offset": 0, "count": 1})
    assert "not here any more" in answer["error"]
    connection.close()
