"""Whether anybody listens at an address, found out in seconds: the clients of MLflow and Ray would try for minutes."""

import socket

REACH_S = 5.0
"""How long a server may take to accept a connection."""


def reach(host: str, port: int) -> None:
    """Connect and hang up.

    Raises:
        OSError: nobody answered.
    """
    socket.create_connection((host, port), timeout=REACH_S).close()
