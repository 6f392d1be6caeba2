"""The run log: numbered, immutable entries that say which driver leads the run and which checkpoints count.

An entry `log/00000042.json` is made by conditional create. Whoever loses the race for a number reads what has taken it:
another driver's take-over fences it, and nothing that it writes from then on counts. A pin or a deletion by a person's
command only moves it on to the next number. Readers trust only log -> manifest -> hash.
"""

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError, DamagedError, StorageError
from workers.common.storage import Store, absolute_url

FORMAT = "raymuon-log-1"
FOLDER = "log"
NAMED_S = 0.5
"""How long an entry may have its name and not its content yet."""
STEPS_TOLD = 12
"""Of the checkpoints that there are, in the message about one that is not."""
Kind = Literal["take_over", "commit", "pin", "unpin", "delete"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry.

    A `take_over` begins attempt `attempt`; a `commit` makes the manifest at `manifest` count; `pin`, `unpin` and
    `delete` are about the commit of that manifest. `writer` is a random name of the process: two processes' entries are
    never the same bytes. `identity` stands in a take-over: what every later attempt must share.
    """

    number: int
    kind: Kind
    attempt: int
    writer: str
    time: float
    identity: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    manifest: str = ""
    sha256: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of a commit: what is known of the run at its step."""
    reason: str = ""
    """For people: of a pin or a deletion; of a take-over, a warning."""

    def encode(self) -> bytes:
        """Return the file's content; the hash of all fields comes last."""
        fields = {"format": FORMAT, **asdict(self)}
        return json.dumps({**fields, "check": _check(fields)}, indent=1).encode()

    @staticmethod
    def decode(data: bytes, where: str) -> "Entry":
        """Read an entry.

        Raises:
            DamagedError: it is not what was written.
            StorageError: it is of a format that this version does not know.
        """
        try:
            fields = json.loads(data)
            check = fields.pop("check", None)
            if (found := fields["format"]) != FORMAT:
                raise StorageError(f"{where}: log format {found!r}, this version reads {FORMAT!r}")
            if check != _check(fields):
                raise DamagedError(f"{where}: damaged (its check is not that of its content)")
            del fields["format"]
            return Entry(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{where}: not an entry of a run log ({error})") from error


def _number(name: str) -> int | None:
    number = name.removesuffix(".json")
    return int(number) if number.isdigit() else None


def _check(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class FencedError(StorageError):
    """Another driver has taken the run over; nothing that this one does to it may count any more."""


class RunLog:
    """The log of the run in `store`, as far as it has been read or written by us. Several threads may use it.

    Args:
        store: the run's folder.
        guard: called before each entry; raises where nothing may be written any more.
    """

    def __init__(self, store: Store, guard: Callable[[], object] = lambda: None) -> None:
        self.store, self.guard = store, guard
        self.writer = secrets.token_hex(8)
        self.entries: list[Entry] = []
        self.damaged: list[str] = []
        """What could not be read; it does not count."""
        self._void: list[int] = []
        """Numbers of damaged entries."""
        self._next = 1
        self._fenced = ""
        """How this process came to know that it does not lead the run any more."""
        self._lock = threading.RLock()
        self.refresh()

    @property
    def run_id(self) -> str:
        """The run's id, by which its folder is named."""
        return self.store.url.rsplit("/", 1)[-1]

    def refresh(self) -> None:
        """Read the entries that others have added."""
        with self._lock:
            names = [name for name in self.store.names(FOLDER) if (_number(name) or 0) >= self._next]
            for name, data in zip(names, self._read(names), strict=True):
                number = int(name.removesuffix(".json"))
                try:
                    self.entries.append(Entry.decode(data, f"{self.store.url}/{FOLDER}/{name}"))
                except DamagedError as error:
                    self.damaged.append(str(error))
                    self._void.append(number)
                self._next = number + 1

    def _read(self, names: list[str]) -> list[bytes]:
        """Return the content of entries; of an empty one only if it stays so: on some disks the name comes first."""
        paths = [f"{FOLDER}/{name}" for name in names]
        found = list(self.store.read_all(paths))
        if not all(found):
            time.sleep(NAMED_S)
            found = list(self.store.read_all(paths))
        return found

    @property
    def attempt(self) -> int:
        """The number of the last take-over; 0 before the first. A damaged entry may have been one."""
        return max((entry.attempt for entry in self.entries), default=0) + len(self._void)

    @property
    def commits(self) -> list[Entry]:
        """The checkpoints that count, oldest first."""
        deleted = {entry.manifest for entry in self.entries if entry.kind == "delete"}
        return [entry for entry in self.entries if entry.kind == "commit" and entry.manifest not in deleted]

    @property
    def pins(self) -> set[str]:
        """The manifests of the checkpoints that nobody deletes."""
        pinned = {}
        for entry in self.entries:
            if entry.kind in ("pin", "unpin"):
                pinned[entry.manifest] = entry.kind == "pin"
        return {manifest for manifest, is_pinned in pinned.items() if is_pinned}

    @property
    def identity(self) -> dict[str, Any] | None:
        """What every attempt of the run must share; None before the first."""
        return next((entry.identity for entry in reversed(self.entries) if entry.kind == "take_over"), None)

    def find(self, step: int | None = None) -> Entry | None:
        """Return the newest commit (of `step`, where one is given); None where there is none."""
        return next((entry for entry in reversed(self.commits) if step in (None, entry.step)), None)

    def commit_of(self, step: int | None = None) -> Entry:
        """Return the newest commit (of `step`, where one is given).

        Raises:
            ConfigError: there is none.
        """
        if (commit := self.find(step)) is not None:
            return commit
        url = self.store.url
        if not (commits := self.commits):
            raise ConfigError(f"{url}: no committed checkpoint; see: raymuon checkpoints ls {url}")
        steps = [str(commit.step) for commit in commits]
        known = ", ".join(steps if len(steps) <= STEPS_TOLD else [*steps[:2], "...", *steps[3 - STEPS_TOLD :]])
        raise ConfigError(f"{url}: no committed checkpoint of step {step}; there are checkpoints of step {known}")

    def manifest(self, step: int | None = None) -> Manifest | None:
        """Return the newest commit's manifest (of `step`, where one is given); None where there is none.

        Raises:
            DamagedError: it is not what was committed.
        """
        entry = self.find(step)
        return entry and Manifest.read(self.store, entry.manifest, entry.sha256)

    def newest_good(self, bad: Collection[str] = ()) -> Manifest | None:
        """Return the newest manifest that can be read; None where nothing was ever committed.

        Args:
            bad: manifests of checkpoints that are known to be damaged.

        Raises:
            DamagedError: there are commits, and not one of them is good.
        """
        commits = self.commits
        for entry in reversed(commits):
            if entry.manifest in bad:
                continue
            try:
                return Manifest.read(self.store, entry.manifest, entry.sha256)
            except DamagedError as error:
                self.damaged.append(str(error))
        if commits:
            raise DamagedError(f"{self.store.url}: none of the {len(commits)} checkpoints is whole")
        return None

    @property
    def reached(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        return max((commit.step for commit in self.commits), default=0)

    def take_over(self, identity: dict[str, Any], warning: str = "") -> int:
        """Become the run's driver and return the number of this attempt.

        Args:
            identity: what every later attempt must share.
            warning: for whoever reads the log.

        Raises:
            FencedError: another driver took over at the same moment.
        """
        attempt = self.attempt + 1
        self._append(kind="take_over", attempt=attempt, identity=identity, reason=warning)
        return attempt

    def commit(self, manifest: Manifest, metrics: dict[str, float] | None = None) -> None:
        """Check the inventory and the files, write the manifest, then make it count.

        May be called again after an error: one whose entry is there, and only the answer was lost, counts once.

        Raises:
            StorageError: something is missing in the checkpoint.
            FencedError: another driver has taken over.
        """
        manifest.check_inventory()
        found = self.store.files(manifest.shards[0].path.rpartition("/")[0])
        for shard in manifest.shards:
            size = found[shard.path].size if shard.path in found else None
            if size != shard.size:
                raise StorageError(
                    f"{self.store.url}/{shard.path}: written with {shard.size} bytes, but the driver finds "
                    f"{'nothing' if size is None else f'{size} bytes'} there; checkpoint.url must be one place for all "
                    "nodes, for instance a shared folder or s3://"
                )
        data = manifest.encode()
        self.guard()
        if not self.store.create(manifest.path, data):
            raise FencedError(f"{self.store.url}/{manifest.path}: another driver wrote this; this one is fenced")
        self._append(
            kind="commit",
            attempt=manifest.attempt,
            step=manifest.step,
            manifest=manifest.path,
            sha256=hashlib.sha256(data).hexdigest(),
            metrics=metrics or {},
            unless=lambda: manifest.path in {commit.manifest for commit in self.commits},
        )

    def mark(self, kind: Literal["pin", "unpin", "delete"], commit: Entry, reason: str) -> bool:
        """Put down that a checkpoint is pinned, not pinned any more, or will be deleted.

        Returns:
            Whether that stands in the log now; what is pinned is not deleted.
        """
        about = {"step": commit.step, "manifest": commit.manifest, "reason": reason}
        return self._append(
            kind=kind,
            attempt=self.attempt,
            unless=lambda: kind == "delete" and commit.manifest in self.pins,
            **about,
        )

    def check_lead(self) -> None:
        """Read what others have added.

        Raises:
            FencedError: a driver that has taken the run over is among them.
        """
        self.refresh()
        if (since := self._led_since) is not None and self._overtaken(since):
            self._fenced = f"{self.store.url}: another driver leads this run; this one is fenced"
        if self._fenced:
            raise FencedError(self._fenced)

    @property
    def _led_since(self) -> int | None:
        """The number of this process's take-over, None for a command that leads nothing."""
        mine = [e.number for e in self.entries if e.kind == "take_over" and e.writer == self.writer]
        return mine[-1] if mine else None

    def _overtaken(self, since: int) -> bool:
        take_overs = [entry.number for entry in self.entries if entry.kind == "take_over"]
        return max([*take_overs, *self._void]) > since  # A damaged entry may have been a take-over.

    def _append(self, kind: Kind, attempt: int, unless: Callable[[], bool] = lambda: False, **fields: Any) -> bool:
        with self._lock:
            while not unless():
                self.guard()
                if self._fenced:
                    raise FencedError(self._fenced)
                entry = Entry(
                    number=self._next, kind=kind, attempt=attempt, writer=self.writer, time=time.time(), **fields
                )
                if self.store.create(f"{FOLDER}/{entry.number:08d}.json", entry.encode()):
                    self.entries.append(entry)
                    self._next += 1
                    return True
                if kind == "take_over":
                    self._fenced = f"{self.store.url}: another driver took this run over at the same moment"
                self.check_lead()
            return False


def split_step(url: str) -> tuple[str, int | None]:
    """Split `URL@STEP` into the run's folder and the step; without a step the newest is meant."""
    base, at, step = url.rpartition("@")
    return (base, int(step)) if at and step.isdecimal() else (url, None)


def find_commit(url: str, s3_endpoint: str = "") -> tuple[RunLog, Entry]:
    """Return the log and the commit of the checkpoint at `URL[@STEP]`, on S3 at this endpoint where it is not AWS.

    Raises:
        ConfigError: there is none.
    """
    base, step = split_step(url)
    log = RunLog(Store(absolute_url(base), s3_endpoint))
    return log, log.commit_of(step)
