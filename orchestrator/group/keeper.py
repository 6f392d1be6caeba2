"""The keeper of a node: it owns the memory of the node's snapshots, and outlives the workers that write into it.

One process per node, without a GPU and without torch. It makes a region of memory for each worker, sends every agreed
snapshot to the keeper of another node (the buddy), writes checkpoints from its memory to storage, answers whoever
restores, and does what only a process of that node can do: look at a worker's stack and end it.

What it holds is found by looking into the regions themselves, so a worker's death at any moment needs no message.
"""

import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import psutil

from orchestrator.group.held import HeldSteps
from orchestrator.group.stack import doings
from orchestrator.group.upload import upload_shard
from orchestrator.group.usage import Usage
from workers.checkpoint.manifest import BUFFER, TensorSlice, place_of
from workers.checkpoint.shards import write_shard
from workers.common.heap import trim
from workers.common.storage import Store
from workers.common.uploads import Bandwidth
from workers.common.wire import Address, Connection, listen
from workers.config import StorageConfig
from workers.reports import Report, SaveFailed
from workers.snapshots import messages
from workers.snapshots.kept import KeptShard
from workers.snapshots.region import HALVES, NONE, NOTES_BYTES, Region, RegionSize

UPLOADS = 2
"""Shards that are written to storage at the same time, each in several parts."""
MAX_SAVING = 2
"""Copies of a worker's snapshots that may be on their way to storage before further checkpoints are left out."""
ACCEPT_AGAIN_S = 0.1
"""Before connections are accepted again where that has failed."""
WOKEN = Report(generation=0, rank=-1, time=0.0)  # No report: it wakes whoever polls.
NOTES = {"counters", "rows", "validation"}
"""Of every agreed snapshot."""


@dataclass(eq=False)
class _Held:
    """A region and whose it is."""

    generation: int
    rank: int
    world_size: int
    region: Region
    path: str
    entries: list[tuple[TensorSlice, int]] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    buddy: Address | None = None
    saving: int = 0
    """Snapshots of this region that are on their way to storage."""
    saved: set[int] = field(default_factory=set)
    """Steps of those, and of those that have come there."""
    agreed: int = 0
    """Snapshots so far that all ranks have agreed on."""


class Keeper:
    """Holds, copies and saves the snapshots of one node's workers.

    Args:
        host: this node's address, on which it listens.
        token: the run's secret.
        storage: how checkpoints reach storage.
    """

    def __init__(self, host: str, token: str, storage: StorageConfig) -> None:
        self._host = host
        self._usage = Usage()
        self._begin(token, storage)

    def _begin(self, token: str, storage: StorageConfig) -> None:
        """Hold nothing, and listen at a port of its own to those who have the token."""
        self._s3_endpoint = storage.s3_endpoint
        self._listener = listen(self._host)
        self._address = Address(self._host, self._listener.getsockname()[1], token)
        self._lock = threading.Lock()
        self._peers: set[Connection] = set()
        self._own: dict[tuple[int, int], _Held] = {}
        self._copies: dict[tuple[int, int], _Held] = {}
        self._steps = HeldSteps()
        self._fence = 0
        self._outbox: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._bandwidth = Bandwidth(storage.max_upload_mb_per_s * 1e6 if storage.max_upload_mb_per_s else None)
        self._uploads = ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload")
        threading.Thread(target=self._accept, args=(self._listener,), name="accept", daemon=True).start()

    def renew(self, token: str, storage: StorageConfig) -> bool:
        """Become as new for another run, whose calls alone come from now on; False where a save is still on its way."""
        with self._lock:
            every, peers = [*self._own.values(), *self._copies.values()], list(self._peers)
        if any(held.saving for held in every):
            return False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # Closed alone, it would not wake whoever accepts.
        self._listener.close()
        for one in (*peers, *(held.region for held in every)):
            one.close()
        self._uploads.shutdown()
        self._begin(token, storage)
        trim()
        return True

    def address(self) -> Address:
        """Return where it listens."""
        return self._address

    def poll(self, timeout_s: float) -> list[Report]:
        """Return what has happened since the last call; wait up to `timeout_s` for the first report."""
        found: list[Report] = []
        with suppress(queue.Empty):
            found.append(self._outbox.get(timeout=timeout_s))
            while True:
                found.append(self._outbox.get_nowait())
        return [report for report in found if report is not WOKEN]

    def wake(self) -> None:
        """Have whoever polls get an answer at once."""
        self._outbox.put(WOKEN)

    def usage(self) -> dict[str, float]:
        """Return how busy the node is, by the names of MLflow's system metrics."""
        return self._usage.sample()

    def inventory(self, fence: int) -> list[KeptShard]:
        """Return every whole snapshot that is here, and listen no more to generations before `fence`."""
        found = []
        with self._lock:
            self._fence = max(self._fence, fence)
            for held in (*self._own.values(), *self._copies.values()):
                for half in range(HALVES):
                    if held.region.sealed(half) != NONE:
                        found.append(self._kept(held, half))
        return found

    def _kept(self, held: _Held, half: int) -> KeptShard:
        agreed = held.region.agreed(half) != NONE
        return KeptShard(
            generation=held.generation,
            rank=held.rank,
            world_size=held.world_size,
            step=held.region.sealed(half),
            agreed=agreed,
            keeper=self._address,
            path=held.path,
            half=half,
            size=held.region.size,
            notes=held.region.notes(half) if agreed else {},
        )

    def hold(self, steps: Collection[int]) -> None:
        """Let what is saved of these steps stay in memory."""
        self._steps.want(steps)

    def held(self, generation: int, step: int) -> list[KeptShard]:
        """Return what stays of a step."""
        return self._steps.of(generation, step)

    def release(self, step: int) -> None:
        """Let go of what stays of a step."""
        self._steps.release(step)

    def save(self, generation: int, step: int, counters: dict[str, int], run_url: str, attempt: int) -> list[int]:
        """Write the parts of a snapshot that this node's workers have left here to storage; no worker is there to ask.

        Returns:
            The ranks whose parts are on their way; a copy for another node does not know what lies where in it.
        """
        with self._lock:
            own = [held for held in self._own.values() if held.generation == generation]
        ranks = []
        for held in own:
            half = next((half for half in range(HALVES) if held.region.sealed(half) == step), None)
            if half is not None:
                ranks.append(held.rank)
                if step not in held.saved:
                    self._save(held, half, run_url, attempt, counters)
        return ranks

    def drop(self, before: int) -> None:
        """Forget all generations before one that can be gone on from."""
        with self._lock:
            for regions in (self._own, self._copies):
                for key in [key for key in regions if key[0] < before]:
                    regions.pop(key).region.close()

    def end(self, pid: int, evidence: bool) -> str:
        """Kill a process of this node; with `evidence`, return its state and stack first."""
        try:
            process = psutil.Process(pid)
            told = doings(process) if evidence else ""
            process.kill()
        except psutil.Error:
            return ""
        return told

    # -- what workers and other keepers ask ----------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while listener.fileno() >= 0:
            try:
                sock, _ = listener.accept()
                threading.Thread(target=self._serve, args=(sock,), name="peer", daemon=True).start()
            except (OSError, RuntimeError):  # No file or no thread is left for it; whoever holds them may let go.
                time.sleep(ACCEPT_AGAIN_S)

    def _serve(self, sock: socket.socket) -> None:
        held: _Held | None = None
        buddy: Connection | None = None
        peer, token = Connection(sock), self._address.token
        self._peers.add(peer)
        try:
            if not peer.admit(token):
                return
            while True:
                answer, content = messages.Done(), b""
                try:
                    head, size = peer.receive()
                    match messages.decode(head):
                        case messages.Open() as message:
                            held = self._open(message)
                            buddy = _close(buddy)
                            answer = messages.Opened(path=held.path)
                        case messages.Push() as message if held:
                            buddy = self._push(held, message.half, buddy)
                        case messages.Ask() if held:
                            answer = messages.Idle(idle=held.saving < MAX_SAVING)
                        case messages.Save() as message if held:
                            counters = held.region.notes(message.half)["counters"]
                            self._save(held, message.half, message.run_url, message.attempt, counters)
                        case messages.Keep() as message:
                            self._keep(peer, message, size)
                        case messages.Read() as message:
                            answer, content = messages.Content(), self._read(message)
                        case messages.Push() | messages.Ask() | messages.Save() as message:
                            raise ValueError(f"{message.op}: it comes before `{messages.Open.op}`")
                        case message:
                            raise ValueError(f"{message.op}: it is no request")
                except OSError:
                    raise
                except Exception as error:  # Whatever a peer says, it gets an answer, and the others are served on.
                    answer = messages.Refused(error=str(error) or type(error).__name__)
                peer.send(messages.encode(answer), content)
        except OSError:
            pass  # The other end is gone; what it had finished is in its region.
        finally:
            _close(buddy)
            peer.close()
            self._peers.discard(peer)

    def _open(self, message: messages.Open) -> _Held:
        """Make a region for a worker, or find the one that it has already.

        Raises:
            ValueError: its generation is over, there is no room, or its fragments do not fit.
        """
        if message.generation < self._fence:
            raise ValueError(f"generation {message.generation} is over; {self._fence} is the one that counts")
        size = RegionSize(message.shard, message.replicated)
        if any(4 * (offset + length) > size.values for *_, length, offset in message.fragments):
            raise ValueError(f"{message.op}: a fragment is outside of the region")
        needed, free = HALVES * size.values, psutil.virtual_memory().available
        if (message.generation, message.rank) not in self._own and needed > free:
            raise ValueError(
                f"no room for snapshots: they need {needed / 1e6:.0f} MB, the node has {free / 1e6:.0f} MB left"
            )
        held = self._held(self._own, message, size)
        with self._lock:
            held.buddy = message.buddy and Address(*message.buddy, self._address.token)
            held.shapes = message.shapes
            held.entries = [
                (TensorSlice(kind, name, start, length), offset)
                for kind, name, start, length, offset in message.fragments
                if kind != BUFFER or held.rank == 0
            ]
        return held

    def _held(
        self, regions: dict[tuple[int, int], _Held], message: messages.Open | messages.Keep, size: RegionSize
    ) -> _Held:
        """Return the region of a generation's rank; make it where there is none."""
        key = message.generation, message.rank
        with self._lock:
            if (held := regions.get(key)) is None:
                held = regions[key] = _Held(*key, message.world_size, *Region.create(size))
        if held.region.size != size:
            raise ValueError(f"rank {held.rank} of generation {held.generation} has a region of another size")
        return held

    def _push(self, held: _Held, half: int, buddy: Connection | None) -> Connection | None:
        """Send a snapshot to the buddy and wait until it is there; return the connection, None without a buddy."""
        if (step := held.region.agreed(half)) == NONE:
            raise ValueError(f"{messages.Push.op}: nobody has agreed on what is there")
        if held.buddy is not None:
            try:
                buddy = buddy or Connection.open(held.buddy)
                about = messages.Keep(
                    generation=held.generation,
                    rank=held.rank,
                    world_size=held.world_size,
                    shard=held.region.size.shard,
                    replicated=held.region.size.replicated,
                    step=step,
                )
                messages.request(buddy, about, messages.Done, held.region.content(half))
            except OSError:  # The driver learns of a dead keeper by itself, and names another buddy.
                buddy = _close(buddy)
        self._count(held)
        return buddy

    def _keep(self, peer: Connection, message: messages.Keep, size: int) -> None:
        """Take another keeper's snapshot in."""
        region = RegionSize(message.shard, message.replicated)
        if not region.values < size <= region.values + NOTES_BYTES:
            raise ValueError(f"{message.op}: {size} bytes are no snapshot with {region.values} bytes of values")
        held = self._held(self._copies, message, region)
        half = held.region.spare()
        held.region.clear(half)
        target = held.region.target(half, size)
        peer.receive_into(target)
        notes = json.loads(bytes(target[region.values :]))
        if not (isinstance(notes, dict) and notes.keys() >= NOTES):  # The driver reads them in any agreed half.
            raise ValueError(f"{message.op}: notes without {', '.join(sorted(NOTES))}")
        held.region.settle(half, message.step, size)
        self._count(held)

    def _count(self, held: _Held) -> None:
        """Note one more snapshot on which all ranks agreed; with the second, older generations have served."""
        held.agreed += 1
        if held.agreed >= 2:
            # Every rank came through the step after the first snapshot, so that one has all its copies.
            self.drop(held.generation)

    def _read(self, message: messages.Read) -> memoryview:
        if (found := self._steps.read(message)) is not None:
            return found
        with self._lock:
            every = (*self._own.values(), *self._copies.values())
        region = next((held.region for held in every if held.path == message.path), None)
        if region is None or region.sealed(message.half) != message.step:
            raise ValueError(f"the snapshot of step {message.step} is not here any more")
        return region.floats(message.half)[message.offset : message.offset + message.count].data.cast("B")

    def _save(self, held: _Held, half: int, run_url: str, attempt: int, counters: dict[str, int]) -> None:
        """Copy the snapshot, so that its half is free again, and write the copy to storage in a thread of its own."""
        values = held.region.floats(half).copy()
        tensors = {entry: values[offset : offset + entry.length] for entry, offset in held.entries}
        step, outbox = held.region.sealed(half), self._outbox
        about = {"generation": held.generation, "rank": held.rank, "step": step}
        self._steps.add(self._kept(held, half), values)
        where = Store(run_url, self._s3_endpoint), place_of(step, attempt, held.generation)

        def upload() -> None:
            write = partial(write_shard, *where, held.rank, tensors, self._bandwidth)
            report = upload_shard(write, about, held.world_size, counters, held.shapes, outbox.put)
            with self._lock:
                held.saving -= 1
                if isinstance(report, SaveFailed):
                    held.saved.discard(step)
            outbox.put(report)

        with self._lock:
            held.saving += 1
            held.saved.add(step)
        self._uploads.submit(upload)


def memory_of(workers: int, copies: int, snapshot: int) -> tuple[int, int]:
    """Return the bytes that a node's keeper holds, and those of copies that are on their way to storage at most.

    Args:
        workers: of the node.
        copies: workers of another node, of whose snapshots it has copies.
        snapshot: bytes of one worker's.
    """
    return HALVES * (workers + copies) * snapshot, MAX_SAVING * workers * snapshot


def new_token() -> str:
    """Return a secret for a run's keepers."""
    return secrets.token_hex(16)


def _close(connection: Connection | None) -> None:
    if connection is not None:
        connection.close()
