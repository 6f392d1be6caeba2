"""Frames between a worker and a keeper, or between two keepers: a header and raw bytes behind it.

Nothing is pickled, and whoever does not know the run's token is not listened to. The bytes go from and into memory that
the caller names, without a copy in between. What headers say is in `workers.snapshots.messages`.
"""

import hmac
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass, field

_FRAME = struct.Struct("!IQ")
"""Bytes of the header, bytes of the payload."""
MOST_HEAD = 1 << 26
"""Bytes of a header: those of a model with a million fragments. What is longer is none of ours."""
SKIPPED = 1 << 16
"""Bytes that are skipped at a time."""
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
        self._unread = 0
        """Bytes behind the last header."""

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
        known = hmac.compare_digest(self._take(len(token.encode())), token.encode())
        self._sock.settimeout(None)
        return known

    def send(self, head: bytes, payload: memoryview | bytes = b"") -> None:
        """Send a header and the bytes that go with it."""
        self._sock.sendall(_FRAME.pack(len(head), len(payload)) + head)
        if len(payload):
            self._sock.sendall(payload)

    def receive(self) -> tuple[bytes, int]:
        """Return the next header and how many bytes come behind it; what nobody has read of the last ones is skipped.

        Raises:
            ValueError: it is too long; the next call skips it.
        """
        while self._unread:
            self._unread -= len(self._take(min(self._unread, SKIPPED)))
        head, self._unread = _FRAME.unpack(self._take(_FRAME.size))
        if head > MOST_HEAD:
            self._unread += head
            raise ValueError(f"a header of {head} bytes; none of ours has more than {MOST_HEAD}")
        return self._take(head), self._unread

    def receive_into(self, target: memoryview) -> None:
        """Fill `target` (of bytes) with what comes behind the header."""
        self._fill(target)
        self._unread -= len(target)

    def _take(self, size: int) -> bytes:
        taken = bytearray(size)
        self._fill(memoryview(taken))
        return bytes(taken)

    def _fill(self, target: memoryview) -> None:
        at = 0
        while at < len(target):
            count = self._sock.recv_into(target[at:])
            if not count:
                raise ConnectionError("the other end has closed the connection")
            at += count

    def close(self) -> None:
        """End the connection; a thread that waits on it is woken."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
