"""The run log: numbered, immutable entries that say which driver leads the run and which checkpoints count.

An entry `log/00000042.json` is made by conditional create. Whoever loses the race for a number has been overtaken by
another driver and is fenced: nothing that it writes from then on counts. Readers trust only log -> manifest -> hash.
"""

import hashlib
import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from workers.checkpoint.manifest import Manifest
from workers.errors import StorageError
from workers.storage import Store

FORMAT = "raymuon-log-1"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry. A `take_over` begins attempt `attempt`; a `commit` makes the manifest at `manifest` count.

    `writer` is a random name of the driver: two drivers' entries are never the same bytes. `identity` stands in a
    take-over: what every later attempt must share.
    """

    number: int
    kind: Literal["take_over", "commit"]
    attempt: int
    writer: str
    time: float
    identity: dict[str, Any] = field(default_factory=dict)
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
            if (found := fields.pop("format")) != FORMAT:
                raise StorageError(f"{where}: log format {found!r}, this version reads {FORMAT!r}")
            return Entry(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{where}: not an entry of a run log ({error})") from error


class FencedError(StorageError):
    """Another driver has taken the run over; nothing that this one does to it may count any more."""


class RunLog:
    """The log of the run in `store`, as far as it has been read or written by us."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.writer = secrets.token_hex(8)
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

    @property
    def identity(self) -> dict[str, Any] | None:
        """What every attempt of the run must share; None before the first."""
        return next((entry.identity for entry in reversed(self.entries) if entry.kind == "take_over"), None)

    def manifest(self, step: int | None = None) -> Manifest | None:
        """Return the newest commit's manifest (of `step`, where one is given); None where there is none."""
        for entry in reversed(self.commits):
            if step is None or entry.step == step:
                return Manifest.read(self.store, entry.manifest, entry.sha256)
        return None

    def take_over(self, identity: dict[str, Any]) -> int:
        """Become the run's driver and return the number of this attempt.

        Raises:
            FencedError: another driver took over at the same moment.
        """
        attempt = self.attempt + 1
        self._append(kind="take_over", attempt=attempt, identity=identity)
        return attempt

    def commit(self, manifest: Manifest) -> None:
        """Check the inventory and the files, write the manifest, then make it count.

        Raises:
            StorageError: something is missing in the checkpoint.
            FencedError: another driver has taken over.
        """
        manifest.check_inventory()
        for shard in manifest.shards:
            if (size := self.store.size(shard.path)) != shard.size:
                raise StorageError(
                    f"{self.store.url}/{shard.path}: written with {shard.size} bytes, but the driver finds "
                    f"{'nothing' if size is None else f'{size} bytes'} there; checkpoint.url must be one place for all "
                    "nodes, for instance a shared folder or s3://"
                )
        data = manifest.encode()
        if not self.store.create(manifest.path, data):
            raise FencedError(f"{self.store.url}/{manifest.path}: another driver wrote this; this one is fenced")
        self._append(
            kind="commit",
            attempt=manifest.attempt,
            step=manifest.step,
            manifest=manifest.path,
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def _append(self, **fields: object) -> None:
        number = len(self.entries) + 1
        entry = Entry(number=number, writer=self.writer, time=time.time(), **fields)  # type: ignore[arg-type]
        if not self.store.create(f"log/{number:08d}.json", entry.encode()):
            raise FencedError(
                f"{self.store.url}/log/{number:08d}.json is taken: another driver leads this run; this one is fenced"
            )
        self.entries.append(entry)
