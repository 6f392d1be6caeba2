"""Which source files a process runs, by their hashes: what was really there, in a container as in a checkout."""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINING_ROOMS = ("optim", "workers")
"""Where the code lies whose change can change a loss."""
ROOMS = (*TRAINING_ROOMS, "orchestrator", "jobs")
"""Our packages; a test holds that every other list of them is this one."""


def files_of(rooms: Iterable[str]) -> dict[str, str]:
    """Return the source files and configs of our packages by path, with the first 16 hex digits of their SHA-256."""
    found = (path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml"))
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(found)}


def digest(files: dict[str, str]) -> str:
    """Return one hash, 16 hex digits, over files by path and their hashes."""
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]


@cache
def training_code() -> str:
    """Return one hash over the code that decides what is trained, as it was when the process asked first."""
    return digest(files_of(TRAINING_ROOMS))
