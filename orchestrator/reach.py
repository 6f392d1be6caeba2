"""Whether anybody listens at an address, found out in seconds: the clients of MLflow and Ray would try for minutes."""

import socket
from urllib.parse import urlparse

from workers.errors import StorageError

REACH_S = 5.0
"""How long a server may take to accept a connection."""


def reach(host: str, port: int) -> None:
    """Connect and hang up.

    Raises:
        OSError: nobody answered.
    """
    socket.create_connection((host, port), timeout=REACH_S).close()


def reach_tracking(uri: str) -> None:
    """Find out within seconds whether the tracking server answers, where there is one.

    Raises:
        StorageError: it does not.
    """
    parsed = urlparse(uri)
    if parsed.scheme in ("http", "https"):
        try:
            reach(parsed.hostname or "", parsed.port or {"http": 80, "https": 443}[parsed.scheme])
        except (OSError, ValueError) as error:  # A port that is none, or a name that cannot be one.
            raise StorageError(
                f"tracking.uri={uri}: no server answers there ({error}); start it, or check the address"
            ) from error
