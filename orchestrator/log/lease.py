"""The lease: a driver says every few seconds that it is alive, so that no other one takes its run by mistake.

What makes two drivers harmless is the run log. The lease keeps the second one from starting, and where a store does not
honour conditional creates it is all that there is. It needs no synchronized clocks: whoever waits for a lease watches
whether it changes.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.log.run_log import FencedError
from workers.common.errors import ClusterError, NotFoundError, StorageError
from workers.common.storage import Store

FORMAT = "raymuon-lease-1"
FILE = "lease.json"
LEASE_S = 15.0
"""A lease that has not changed for so long is nobody's."""
RENEW_S = 4.0
BEYOND = 10**9
"""Whoever takes a lease over counts on from so far beyond: of two that write over each other, the newer is known."""
LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has said that it leads the run."""

    writer: str
    renewed: int
    """How often it has said so."""
    host: str
    pid: int
    held: bool

    @staticmethod
    def read(store: Store) -> "Holder | None":
        """Return who holds the lease; None where there is none, or one that cannot be read."""
        try:
            fields: dict[str, Any] = json.loads(store.read(FILE))
            return Holder(**fields) if fields.pop("format") == FORMAT else None
        except (NotFoundError, ValueError, KeyError, TypeError):
            return None


def await_free(
    store: Store, sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.monotonic
) -> None:
    """Wait until nobody leads the run: at once where its driver has ended, LEASE_S where it was killed.

    Args:
        store: the run's folder.
        sleep: waits; raises where it may not.
        clock: tells the seconds.

    Raises:
        ClusterError: a driver leads it.
    """
    first = Holder.read(store)
    if first is None or not first.held:
        return
    until = clock() + LEASE_S
    while clock() < until:
        sleep(LOOK_S)
        holder = Holder.read(store)
        if holder is None or not holder.held:
            return
        if holder != first:
            raise ClusterError(
                f"{store.url}: process {holder.pid} on {holder.host} leads this run. Stop it, or take the run from it "
                "with --takeover"
            )


class Lease:
    """Held from `__enter__` to `__exit__`, and renewed by a thread.

    Args:
        store: the run's folder.
        strict: the store does not honour conditional creates: without a fresh lease nothing may be written.
        clock: tells the seconds.
    """

    def __init__(self, store: Store, strict: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.strict, self._clock = store, strict, clock
        self.writer = secrets.token_hex(8)
        self._renewed = 0
        self._fresh = clock()
        self._taken_by: Holder | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        if (before := Holder.read(self.store)) is not None:
            self._renewed = before.renewed + BEYOND
        self._write(held=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):
            if self._taken_by is None and not self._is_taken():
                self._write(held=False)

    def check(self) -> None:
        """Raise where this driver does not lead the run any more.

        Raises:
            FencedError: another one has taken it over.
            StorageError: nobody knows, and the store does not keep two drivers apart.
        """
        if (other := self._taken_by) is not None:
            raise FencedError(
                f"{self.store.url}: process {other.pid} on {other.host} has taken this run over; this one ends"
            )
        if self.strict and (silent := self._clock() - self._fresh) > LEASE_S:
            raise StorageError(f"{self.store.url}/{FILE}: could not be renewed for {silent:.0f} s")

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with suppress(StorageError):  # Storage is away: it is tried again, and `check` tells.
                if self._is_taken():
                    return
                self._write(held=True)

    def _is_taken(self) -> bool:
        holder = Holder.read(self.store)
        if holder is not None and holder.writer != self.writer and holder.renewed > self._renewed:
            self._taken_by = holder  # One with a lower count had looked before this one came, and has written since.
        return self._taken_by is not None

    def _write(self, held: bool) -> None:
        self._renewed += 1
        about = {"writer": self.writer, "renewed": self._renewed, "host": socket.gethostname(), "pid": os.getpid()}
        self.store.put(FILE, json.dumps({"format": FORMAT, **about, "held": held}).encode())
        self._fresh = self._clock()
