"""Workers that are passed on from one run of this process to the next, with their slots.

A worker takes seconds for its imports, which a run of a minute would pay each time. So a run's workers are not ended
with it where they are well: they wait, each in its slot, for a run that asks for such a one.

Invariant: whoever gets one has it as if it were new. Nothing that the earlier run has still to say reaches it: its
calls have ended, and more of them are refused, before the worker forgets that run; from then on it is of none. One that
does not come that far within seconds is ended, and a new one starts in its place.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestrator.config import ScalingConfig
from orchestrator.group.handles import Cluster, Gone, Handle, Joined
from orchestrator.group.keeper import new_token
from workers.config import StorageConfig

RENEW_S = 5.0
"""How long a worker may take to leave its run, and again to answer the next one."""
PATIENCE_S = 1.0
"""How long a run waits for a slot before those that are kept for runs with other reservations are given up."""


@contextmanager
def warm(joined: Joined) -> Iterator[Joined]:
    """Yield a joined cluster whose runs pass their workers on, until the end of the context.

    Any number of runs may use it, at the same time, too. A run gets a worker that has reserved what it reserves itself;
    slots are kept with their workers, and given back at the end, or when a run with other reservations waits for room.
    """
    kept = _Kept(joined)
    try:
        yield kept
    finally:
        kept.close()


class _Lent:
    """A worker as one run has it."""

    def __init__(self, worker: Handle) -> None:
        self.worker = worker
        self._lock = threading.Lock()
        self._calls: set[Future[Any]] = set()
        self._over = False

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of the worker, unless the run is over."""
        with self._lock:
            if self._over:
                answer: Future[Any] = Future()
                answer.set_exception(Gone("it is another run's"))
                return answer
            answer = self.worker.call(method, *arguments)
            self._calls.add(answer)
        answer.add_done_callback(self._calls.discard)
        return answer

    def kill(self) -> None:
        """End the worker's process."""
        self.worker.kill()

    def end(self) -> set[Future[Any]]:
        """Take no more calls; return those that have no answer yet."""
        with self._lock:
            self._over = True
            return set(self._calls)


@dataclass(eq=False)
class _Idle:
    """A worker that waits for a run, or is on its way to one."""

    cluster: Cluster
    """That has reserved its slot."""
    slot: str
    worker: Handle
    well: Future[bool] = field(default_factory=Future)
    """Whether it can be used, as far as it is known."""


class _Kept:
    """A joined cluster, and the workers that wait on it."""

    def __init__(self, joined: Joined) -> None:
        self._joined = joined
        self._lock = threading.Lock()
        self._clusters: dict[tuple[tuple[str, float], ...], Cluster] = {}
        """By what a slot takes: who has reserved a slot has to give it back."""
        self._idle: list[_Idle] = []
        self._keepers: list[tuple[str, Handle]] = []
        """That wait, and their nodes."""
        self._closed = False
        self._threads = ThreadPoolExecutor(thread_name_prefix="renew")

    def slots(self, scaling: ScalingConfig) -> "_Slots":
        """Return the cluster as a run of this size sees it.

        Raises:
            ClusterError: it will never have room for its minimum.
        """
        found = self._joined.slots(scaling)
        with self._lock:
            return _Slots(self, self._clusters.setdefault(tuple(sorted(found.bundle.items())), found))

    def park(self, cluster: Cluster, slot: str, lent: _Lent) -> None:
        """Keep a worker that a run has done with."""
        idle = _Idle(cluster, slot, lent.worker)
        with self._lock:
            if not self._closed:
                self._idle.append(idle)
                idle.well = self._threads.submit(self._renew, idle, lent.end())
                return
        cluster.hand_back(slot, lent.worker)

    def park_keeper(self, node: str, lent: _Lent) -> None:
        """Keep a keeper that a run has done with, once it holds nothing of it."""

        def renew() -> None:
            calls = lent.end()
            lent.worker.call("wake")
            well = _renewed(lent.worker, calls, new_token(), StorageConfig())
            with self._lock:
                if well and not self._closed:
                    self._keepers.append((node, lent.worker))
                    return
            lent.worker.kill()

        with self._lock:
            if not self._closed:
                self._threads.submit(renew)
                return
        lent.kill()

    def take_keeper(self, node: str) -> Handle | None:
        """Take a keeper that waits on a node, if there is any."""
        with self._lock:
            found = next((one for one in reversed(self._keepers) if one[0] == node), None)
            if found is None:
                return None
            self._keepers.remove(found)
            return found[1]

    def put_back(self, idle: _Idle) -> None:
        """Keep a worker that was taken and not used."""
        with self._lock:
            if not self._closed:
                self._idle.append(idle)
                return
        idle.cluster.hand_back(idle.slot, idle.worker)

    def take(self, cluster: Cluster) -> _Idle | None:
        """Take the worker that was parked last in a slot of this cluster, if any; whether it is well is told soon."""
        with self._lock:
            found = next((idle for idle in reversed(self._idle) if idle.cluster is cluster), None)
            if found is not None:
                self._idle.remove(found)
                parked = found.well
                found.well = self._threads.submit(lambda: parked.result() and self._renew(found))
        return found

    def make_room(self, cluster: Cluster) -> None:
        """Give up what waits in slots of other clusters than this one."""
        self._give_up(lambda idle: idle.cluster is not cluster)

    def close(self) -> None:
        """Give up all that waits; whatever comes later is not kept."""
        with self._lock:
            self._closed = True
            keepers, self._keepers = self._keepers, []
        for _, keeper in keepers:
            keeper.kill()
        self._give_up(lambda idle: True)
        self._threads.shutdown(wait=False)

    def _give_up(self, which: Callable[[_Idle], bool]) -> None:
        with self._lock:
            gone = [idle for idle in self._idle if which(idle)]
            self._idle = [idle for idle in self._idle if idle not in gone]
        for idle in gone:
            idle.cluster.hand_back(idle.slot, idle.worker)

    def _renew(self, idle: _Idle, calls: Collection[Future[Any]] = ()) -> bool:
        """Have a worker forget its run, once its calls have ended; end one that does not, and tell."""
        well = _renewed(idle.worker, calls, RENEW_S)
        if not well:
            self._lose(idle)
        return well

    def _lose(self, idle: _Idle) -> None:
        """End a worker; its slot stays with whoever has taken it."""
        idle.worker.kill()
        with self._lock:
            waits = idle in self._idle
            if waits:
                self._idle.remove(idle)
        if waits:
            idle.cluster.release(idle.slot)


def _renewed(process: Handle, calls: Collection[Future[Any]], *arguments: Any) -> bool:
    """Have a process forget its run once its calls have ended, and tell whether it has."""
    if wait(calls, RENEW_S).not_done:
        return False
    try:
        return process.call("renew", *arguments).result(2 * RENEW_S)
    except Exception:  # It is gone, or does not answer.
        return False


class _Slots:
    """The cluster of one run: its slots are new ones, or such with a worker that another run has parked.

    A slot keeps the name by which the run knows it, though it may become another one while it is pending.
    """

    def __init__(self, kept: _Kept, cluster: Cluster) -> None:
        self._kept, self._cluster = kept, cluster
        self.bundle = cluster.bundle
        self._slots: dict[str, str] = {}
        """The cluster's names, by the run's."""
        self._idle: dict[str, _Idle] = {}
        """Workers that are to go on in slots, by the run's names."""
        self._asked: dict[str, float] = {}
        """When a slot was asked for, on the monotonic clock."""

    def room(self) -> int:
        """Return how many workers the nodes could hold if they were empty."""
        return self._cluster.room()

    def reserve(self) -> str:
        """Take a slot with a worker, or ask for one more."""
        idle = self._kept.take(self._cluster)
        name = idle.slot if idle else self._cluster.reserve()
        self._slots[name], self._asked[name] = name, time.monotonic()
        if idle is not None:
            self._idle[name] = idle
        return name

    def node_of(self, slot: str) -> str | None:
        """Return the node of a slot, None while it is pending or its worker's state is not known."""
        if slot not in self._slots or (slot in self._idle and not self._idle[slot].well.done()):
            return None
        node = self._cluster.node_of(self._slots[slot])
        if node is None:
            self._find_room(slot)
        return node

    def release(self, slot: str) -> None:
        """Give a slot back; a worker that was to go on there waits for another run."""
        idle, held = self._idle.pop(slot, None), self._slots.pop(slot, None)
        if idle is not None:
            self._kept.put_back(idle)
        elif held is not None:
            self._cluster.release(held)

    def hand_back(self, slot: str, worker: Handle) -> None:
        """Give a slot back with its worker, which waits there for another run."""
        assert isinstance(worker, _Lent)
        self._kept.park(self._cluster, self._slots.pop(slot), worker)

    def start_worker(self, slot: str) -> Handle:
        """Have the worker of a slot go on, where it has one that is well; else start one."""
        idle = self._idle.pop(slot, None)
        well = idle is not None and idle.well.result()
        return _Lent(idle.worker if idle and well else self._cluster.start_worker(self._slots[slot]))

    def start_keeper(self, node: str, token: str, storage: StorageConfig) -> Handle:
        """Have a keeper that waits on the node begin anew, or start one."""
        while (waiting := self._kept.take_keeper(node)) is not None:
            if _renewed(waiting, (), token, storage):
                return _Lent(waiting)
            waiting.kill()
        return _Lent(self._cluster.start_keeper(node, token, storage))

    def hand_back_keeper(self, node: str, keeper: Handle) -> None:
        """Give a keeper back, which waits there for another run."""
        assert isinstance(keeper, _Lent)
        self._kept.park_keeper(node, keeper)

    def share(self, value: Any) -> Any:
        """Return what a call can have in the place of an argument."""
        return self._cluster.share(value)

    def alive(self, node: str) -> bool:
        """Tell whether the cluster takes the node for alive."""
        return self._cluster.alive(node)

    def draining(self) -> dict[str, float]:
        """Return the nodes that will go away, and the seconds until then."""
        return self._cluster.draining()

    def _find_room(self, slot: str) -> None:
        """Get a pending slot a place that is kept: a parked worker's, or that of workers of other reservations."""
        if (idle := self._kept.take(self._cluster)) is not None:
            self._cluster.release(self._slots[slot])
            self._slots[slot], self._idle[slot] = idle.slot, idle
        elif time.monotonic() - self._asked[slot] > PATIENCE_S:
            self._kept.make_room(self._cluster)
