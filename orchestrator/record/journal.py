"""The journal: every event of a run and every row of its record, shipped to the run's folder with each commit.

MLflow may be away for hours and the driver may die meanwhile: what a commit stands for is in the journal by then, and
the next driver gives MLflow what it lacks. One file for each commit, never changed; its last line holds the SHA-256 of
the others. A line is an event, a row of the record, or a sign of life; lines that no version of ours has written so far
are left out when they are read.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from orchestrator.record.events import Event, read_event
from workers.common.storage import Store

FOLDER = "journal"


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of a step: a row of the series `train` or `validation`."""

    series: str
    step: int
    time: float
    """Seconds since the epoch."""
    values: dict[str, float]

    def record(self) -> dict[str, Any]:
        """Return the journal's form."""
        return {"series": self.series, "step": self.step, "time": self.time, "values": self.values}


@dataclass(frozen=True, slots=True)
class Alive:
    """A driver had lived for `uptime` seconds when its clock showed `time`."""

    uptime: float
    time: float

    def record(self) -> dict[str, Any]:
        """Return the journal's form."""
        return asdict(self)


Line: TypeAlias = Event | Row | Alive


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

    def add(self, line: Line) -> None:
        """Take a line in."""
        self._lines.append(json.dumps(line.record()))

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


def read_journal(store: Store, damaged: Callable[[str], object]) -> Iterator[Line]:
    """Yield all lines that earlier drivers have shipped, in order.

    Args:
        store: the run's folder.
        damaged: told of each file that is not what was written; it is left out.
    """
    names = store.names(FOLDER)
    for name, data in zip(names, store.read_all([f"{FOLDER}/{name}" for name in names]), strict=True):
        lines, _, check = data.rpartition(b"\n")
        if check == _check(lines):
            yield from filter(None, map(_read, lines.splitlines()))
        else:
            damaged(f"{store.url}/{FOLDER}/{name}: damaged; the record may lack what was in it")


def _read(line: bytes) -> Line | None:
    match json.loads(line):
        case {"event": str()} as event:
            return read_event(event)
        case {"series": str(series), "step": int(step), "time": time, "values": dict(values)}:
            return Row(series, step, time, values)
        case {"uptime": uptime, "time": time}:
            return Alive(uptime, time)
    return None


def _check(lines: bytes) -> bytes:
    return json.dumps({"sha256": hashlib.sha256(lines).hexdigest()}).encode()
