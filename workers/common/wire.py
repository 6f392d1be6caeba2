"""Framed messages between a worker and a keeper, or between two keepers: JSON headers with raw bytes behind them.

Nothing is pickled, and whoever does not know the run's token is not listened to. The bytes go from and into memory that
the caller names, without a copy in between.
"""

import hmac
import json
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_FRAME = struct.Struct("!IQ")
"""Bytes of the JSON header, bytes of the payload."""
CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a keeper listens, and the secret of the run."""

    host: str
    port: int
    token: str = field(repr=False)


def listen(host: str) -> socket.socket:
    """Return a socket that listens at any free port of an address of either family, or of a name."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address, family=family)


class Connection:
    """One end of a connection; ConnectionError when the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock

    @staticmethod
    def open(address: Address) -> "Connection":
        """Connect to a keeper and prove that we belong to its run.

        Raises:
            OSError: nobody listens there.
        """
        sock = socket.create_connection((address.host, address.port), timeout=CONNECT_S)
        sock.settimeout(None)
        connection = Connection(sock)
        sock.sendall(address.token.encode())
        return connection

    def admit(self, token: str) -> bool:
        """On the listening side: read the other's token and tell whether it is ours."""
        self._sock.settimeout(CONNECT_S)
        known = hmac.compare_digest(bytes(self.receive_bytes(len(token.encode()))), token.encode())
        self._sock.settimeout(None)
        return known

    def send(self, message: dict[str, Any], payload: memoryview | bytes = b"") -> None:
        """Send a message and the bytes that go with it."""
        head = json.dumps(message).encode()
        self._sock.sendall(_FRAME.pack(len(head), len(payload)) + head)
        if len(payload):
            self._sock.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], int]:
        """Return the next message and how many bytes come behind it; they have to be read before the next."""
        head, payload = _FRAME.unpack(self.receive_bytes(_FRAME.size))
        return json.loads(bytes(self.receive_bytes(head))), payload

    def receive_bytes(self, size: int) -> memoryview:
        """Return the next bytes."""
        target = memoryview(bytearray(size))
        self.receive_into(target)
        return target

    def receive_into(self, target: memoryview) -> None:
        """Fill `target` (of bytes) with the next bytes."""
        at = 0
        while at < len(target):
            count = self._sock.recv_into(target[at:])
            if not count:
                raise ConnectionError("the other end has closed the connection")
            at += count

    def request(self, message: dict[str, Any], payload: memoryview | bytes = b"") -> dict[str, Any]:
        """Send a message and return the answer, one without bytes."""
        self.send(message, payload)
        return self.receive()[0]

    def close(self) -> None:
        """End the connection; a thread that waits on it is woken."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
