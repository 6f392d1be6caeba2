"""The journal: every event of a run and every row of its record, shipped to the run's folder with each commit.

MLflow may be away for hours and the driver may die meanwhile: what a commit stands for is in the journal by then, and
the next driver gives MLflow what it lacks. One file for each commit, never changed; its last line holds the SHA-256 of
the others.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from workers.common.storage import Store

FOLDER = "journal"


class Journal:
    """The lines that have not been shipped, and the way to those that have.

    Args:
        store: the run's folder.
        attempt: of this driver.
    """

    def __init__(self, store: Store, attempt: int) -> None:
        self.store, self.attempt = store, attempt
        self._lines: list[str] = []
        self._number = 0
        self._batch = b""
        """What goes under that number: a try whose answer was lost must not put it down a second time."""

    def add(self, record: dict[str, Any]) -> None:
        """Take a line in."""
        self._lines.append(json.dumps(record))

    def ship(self) -> None:
        """Put the waiting lines into the run's folder.

        Raises:
            StorageError: they could not be written; they wait on.
        """
        while self._batch or self._lines:
            if not self._batch:
                lines = "\n".join(self._lines).encode()
                self._batch = lines + b"\n" + _check(lines)
                self._number += 1
                self._lines.clear()
            self.store.create(f"{FOLDER}/{self.attempt:04d}-{self._number:06d}.jsonl", self._batch)
            self._batch = b""


def read_journal(store: Store, damaged: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    """Yield all lines that earlier drivers have shipped, in order.

    Args:
        store: the run's folder.
        damaged: told of each file that is not what was written; it is left out.
    """
    names = store.names(FOLDER)
    for name, data in zip(names, store.read_all([f"{FOLDER}/{name}" for name in names]), strict=True):
        lines, _, check = data.rpartition(b"\n")
        if check == _check(lines):
            yield from map(json.loads, lines.splitlines())
        else:
            damaged(f"{store.url}/{FOLDER}/{name}: damaged; the record may lack what was in it")


def _check(lines: bytes) -> bytes:
    return json.dumps({"sha256": hashlib.sha256(lines).hexdigest()}).encode()
