"""The run log: numbered, immutable entries that say which driver leads the run and which checkpoints count.

An entry `log/00000042.json` is made by conditional create. Whoever loses the race for a number has been overtaken by
another driver and is fenced: nothing that it writes from then on counts. Readers trust only log -> manifest -> hash.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from typing import Literal

from workers.checkpoint.manifest import Manifest
from workers.errors import StorageError
from workers.storage import Store

FORMAT = "raymuon-log-1"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry. A `take_over` begins attempt `attempt`; a `commit` makes the manifest at `manifest` count."""

    number: int
    kind: Literal["take_over", "commit"]
    attempt: int
    time: float
    step: int = 0
    manifest: str = ""
    sha256: str = ""

    def encode(self) -> bytes:
        """Return the file's content."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @staticmethod
    def decode(data: bytes, where: str) -> "Entry":
        """Read an entry.

        Raises:
            StorageError: it is damaged, or of a format that this version does not know.
        """
        try:
            fields = json.loads(data)
            found = fields.pop("format")
        except (ValueError, KeyError) as error:
            raise StorageError(f"{where}: not an entry of a run log ({error})") from error
        if found != FORMAT:
            raise StorageError(f"{where}: log format {found!r}, this version reads {FORMAT!r}")
        return Entry(**fields)


class RunLog:
    """The log of the run in `store`, as far as it has been read or written by us."""

    def __init__(self, store: Store) -> None:
        self.store = store
        names = [name for name in store.names("log") if name.endswith(".json")]
        self.entries = [Entry.decode(store.read(f"log/{name}"), f"{store.url}/log/{name}") for name in names]

    @property
    def attempt(self) -> int:
        """The number of the last take-over; 0 before the first."""
        return max((entry.attempt for entry in self.entries), default=0)

    @property
    def commits(self) -> list[Entry]:
        """The commits, oldest first."""
        return [entry for entry in self.entries if entry.kind == "commit"]

    def manifest(self, step: int | None = None) -> Manifest | None:
        """Return the newest commit's manifest (of `step`, where one is given); None where there is none."""
        for entry in reversed(self.commits):
            if step is None or entry.step == step:
                return Manifest.read(self.store, entry.manifest, entry.sha256)
        return None

    def take_over(self) -> int:
        """Become the run's driver and return the number of this attempt.

        Raises:
            StorageError: another driver took over at the same moment.
        """
        attempt = self.attempt + 1
        self._append(kind="take_over", attempt=attempt)
        return attempt

    def commit(self, manifest: Manifest) -> None:
        """Check the inventory, write the manifest, then make it count.

        Raises:
            StorageError: something is missing in the checkpoint, or another driver has taken over.
        """
        manifest.check_inventory()
        data = manifest.encode()
        if not self.store.create(manifest.path, data):
            raise StorageError(f"{self.store.url}/{manifest.path}: another driver wrote this; this one is fenced")
        self._append(
            kind="commit",
            attempt=manifest.attempt,
            step=manifest.step,
            manifest=manifest.path,
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def _append(self, **fields: object) -> None:
        number = len(self.entries) + 1
        entry = Entry(number=number, time=time.time(), **fields)  # type: ignore[arg-type]
        if not self.store.create(f"log/{number:08d}.json", entry.encode()):
            raise StorageError(
                f"{self.store.url}/log/{number:08d}.json is taken: another driver leads this run; this one is fenced"
            )
        self.entries.append(entry)
