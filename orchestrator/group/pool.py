"""The processes of a run: workers that are ready or about to be, and a keeper on every node that has any.

The pool holds as many slots as the config allows, starts a worker in each that has a node, and replaces what dies. A
worker of a node whose keeper does not answer is replaced only when the node is known to be alive: a dead node is taken
for alive by the cluster for many seconds, and whatever is sent there dies.

`refresh` looks at everything once and never blocks; `wait` does so until a condition holds.
"""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from orchestrator.config import ScalingConfig
from orchestrator.group.handles import Cluster, Gone
from orchestrator.group.processes import PoolKeeper, PoolWorker
from orchestrator.policy import Candidate, backoff
from orchestrator.record.metrics import NodeUsage
from orchestrator.watchdog import Attention
from workers.common.errors import ClusterError
from workers.common.source import training_code
from workers.common.wire import Address
from workers.config import StorageConfig
from workers.reports import Report
from workers.task import Task

POLL_S = 1.0
"""How long a keeper holds a poll open when it has nothing to tell."""
DRAIN_LOOK_S = 0.5
KEEPER_START_S = 120.0
"""How long a keeper may take to answer for the first time."""
REVIVE_S, MOST_REVIVE_S = 1.0, 60.0
"""Between two tries to start a keeper on a node; twice as long after each that has died before it answered."""
USAGE_S = 10.0
"""Between two looks at how busy a node is; MLflow's own interval."""
STILLBORN = 3
"""Workers of a slot, or keepers of a node, that may die in a row before they are ready."""
STRETCH_S = 0.05
"""Between two looks of whoever waits for what no news tells: a slot that gets its node, a request to stop."""
BARREN_S, MOST_BARREN_S = 10.0, 600.0
"""How long a slot is left empty after that, where others are enough; then twice as long each time."""


@dataclass
class Told:
    """What the keepers have told, and what the pool has found."""

    reports: list[Report] = field(default_factory=list)
    usage: list[NodeUsage] = field(default_factory=list)
    lost_keepers: int = 0
    """That may have had something."""


class Pool:
    """All worker and keeper processes of a run.

    Args:
        cluster: where they live.
        scaling: how many.
        storage: how keepers reach storage.
        token: the keepers' secret.
        hang_s: a keeper that does not answer for this long is replaced.
        notice: takes a line about what is wrong.
    """

    def __init__(
        self,
        cluster: Cluster,
        scaling: ScalingConfig,
        storage: StorageConfig,
        token: str,
        hang_s: float,
        notice: Callable[[str], None],
    ) -> None:
        self.cluster, self.scaling, self.storage, self.token = cluster, scaling, storage, token
        self.hang_s, self.notice = hang_s, notice
        self.slots: list[str] = []
        self.workers: dict[int, PoolWorker] = {}
        self.keepers: dict[str, PoolKeeper] = {}
        self.rehearsal: Task | None = None
        """What newcomers and standbys rehearse; the first members have no time to lose, and rehearse by training."""
        self.training = False
        """Whether a generation has been formed."""
        self._attention = Attention()
        self.news = threading.Event()
        """Set where a process has told something, or is gone; cleared by whoever takes it in."""
        self.draining: dict[str, float] = {}
        self._orphans: dict[str, float] = {}
        """Nodes that have lost their keeper, and when to start another."""
        self._revived: dict[str, float] = {}
        self._unstarted: dict[str, int] = {}
        """Nodes that wait for their first keeper's answer, or of whose later ones one has died before it answered, and
        how many have: what began to train there could not be saved."""
        self._looked_for_drains = 0.0
        self._next_number = 0
        self._stillborn: dict[str, int] = {}
        self._barren: dict[str, float] = {}
        """Slots that are left empty, and until when."""
        self._held: tuple[int, ...] = ()
        """Steps of which the keepers hold what is saved, for branches."""
        self._code = training_code()
        self._told = Told()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        """Give all slots and processes back, and end those that are not well."""
        well = {worker.slot: worker for worker in self.free}
        for worker in self.workers.values():
            if worker.slot not in well:
                worker.handle.kill()
        for slot in self.slots:
            if slot in well:
                self.cluster.hand_back(slot, well[slot].handle)
            else:
                self.cluster.release(slot)
        for keeper in self.keepers.values():
            if keeper.address is not None:
                self.cluster.hand_back_keeper(keeper.node, keeper.handle)
            else:
                keeper.handle.kill()

    def look(self) -> float:
        """Return the time by which the silence of processes is measured: it leaves the driver's own pauses out."""
        return self._attention.look(time.monotonic())

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def free(self) -> list[PoolWorker]:
        """The workers that could train now."""
        return [
            worker
            for worker in self.workers.values()
            if self._is_ready(worker) and not worker.leaving and worker.node not in self.draining
        ]

    @property
    def candidates(self) -> list[Candidate]:
        """The same, as the policy knows them."""
        return [Candidate(worker.number, worker.node) for worker in self.free]

    @property
    def num_starting(self) -> int:
        """Workers that have a slot, and are not ready yet or have no keeper, where one may still come."""
        return sum(not self._is_ready(one) and not self._is_hopeless(one.node) for one in self.workers.values())

    @property
    def imports_s(self) -> float:
        """Seconds that the slowest of the workers took for its imports."""
        return max((worker.ready.imports_s for worker in self.workers.values() if worker.ready), default=0.0)

    def _is_ready(self, worker: PoolWorker) -> bool:
        return worker.ready is not None and worker.node not in self._unstarted

    def _is_hopeless(self, node: str | None) -> bool:
        return self._unstarted.get(node or "", 0) >= STILLBORN

    @property
    def _others_suffice(self) -> bool:
        """Tell whether a run can be led without the slots in which nothing starts."""
        if self.training:
            return len(self.free) >= self.scaling.min_workers
        able = [s for s in self.slots if s not in self._barren and not self._is_hopeless(self.cluster.node_of(s))]
        return len(able) >= self.scaling.min_workers

    @property
    def num_slots(self) -> int:
        """Slots that the cluster has given."""
        return sum(self.cluster.node_of(slot) is not None for slot in self.slots)

    def keeper_of(self, node: str | None) -> Address | None:
        """Return where a node's keeper listens, None while it has none."""
        keeper = self.keepers.get(node or "")
        return keeper.address if keeper else None

    def hold(self, steps: tuple[int, ...]) -> None:
        """Have all keepers, those that are yet to come too, hold what is saved of these steps."""
        self._held = steps
        for keeper in self.keepers.values():
            keeper.handle.call("hold", steps)

    def release_held(self, step: int) -> None:
        """Have all keepers let go of what they hold of a step; from any thread."""
        for keeper in list(self.keepers.values()):
            keeper.handle.call("release", step)

    def take(self) -> Told:
        """Return what there is to tell since the last call."""
        told, self._told = self._told, Told()
        return told

    # -- housekeeping --------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look at everything once: slots, newcomers, keepers, nodes that will go away.

        Raises:
            ClusterError: workers die before they are ready, again and again, and too few others are there.
        """
        now = time.monotonic()
        if now - self._looked_for_drains > DRAIN_LOOK_S:
            self._looked_for_drains = now
            self.draining = self.cluster.draining()
        staying = [slot for slot in self.slots if self.cluster.node_of(slot) not in self.draining]
        for _ in range(self.scaling.max_workers + self.scaling.standby - len(staying)):
            self.slots.append(self.cluster.reserve())
        for keeper in list(self.keepers.values()):
            self._look_at_keeper(keeper, self.look())
        for node in list(self._orphans):
            self._revive(node, now)
        occupied = {worker.slot for worker in self.workers.values()}
        for slot in [slot for slot in self.slots if slot not in occupied and now >= self._barren.get(slot, 0.0)]:
            self._fill(slot)
        for worker in [worker for worker in self.workers.values() if worker.ready is None]:
            self._look_at_newcomer(worker)

    def wait(self, until: Callable[[], bool], look: Callable[[], object], seconds: float = math.inf) -> bool:
        """Look at everything, at once where there is news, until a condition holds; return whether it does.

        Args:
            until: the condition.
            look: called before it each time; raises where nobody may wait any longer.
            seconds: to wait at most.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.refresh()
            look()
            if until():
                return True
            if (left := deadline - time.monotonic()) <= 0:
                return False
            self.news.wait(min(left, STRETCH_S))
            self.news.clear()

    def _fill(self, slot: str) -> None:
        node = self.cluster.node_of(slot)
        if node is None or node in self.draining or node in self._orphans:
            return
        if node not in self.keepers:
            self._unstarted[node] = 0
            self._start_keeper(node)
        elif self.keepers[node].address is None and self.training:
            return  # Once training has begun, a keeper that answers is the proof that a node is alive.
        number, self._next_number = self._next_number, self._next_number + 1
        handle = self.cluster.start_worker(slot)
        late = self.training or number >= self.scaling.max_workers
        preparing = handle.call("prepare", self.rehearsal if late else None)
        preparing.add_done_callback(self._wake)
        self.workers[number] = PoolWorker(number, slot, node, handle, preparing)

    def _start_keeper(self, node: str) -> None:
        handle = self.cluster.start_keeper(node, self.token, self.storage)
        starting = handle.call("address")
        starting.add_done_callback(self._wake)
        self.keepers[node] = PoolKeeper(node, handle, starting, heard=self.look())
        if self._held:
            handle.call("hold", self._held)

    def _revive(self, node: str, now: float) -> None:
        if not self.cluster.alive(node):
            self._give_up(node)
        elif now >= self._orphans[node]:
            del self._orphans[node]
            self._revived[node] = now
            self._start_keeper(node)

    def _give_up(self, node: str) -> None:
        """Forget a dead node, and ask for other slots in place of its own."""
        self._orphans.pop(node, None)
        self._unstarted.pop(node, None)
        if (keeper := self.keepers.pop(node, None)) is not None:
            self._told.lost_keepers += keeper.address is not None
            keeper.handle.kill()
        for worker in [worker for worker in self.workers.values() if worker.node == node]:
            self.lose(worker.number)
        for slot in [slot for slot in self.slots if self.cluster.node_of(slot) == node]:
            self.slots.remove(slot)
            self.cluster.release(slot)

    def _look_at_newcomer(self, worker: PoolWorker) -> None:
        if not worker.preparing.done():
            return
        try:
            ready = worker.preparing.result()
            if ready.code != self._code:  # The record would name the driver's, silently.
                raise Gone(
                    f"its optim/ and workers/ are not the driver's (hash {ready.code}, not {self._code}); start all "
                    "from one image or commit, or use raymuon submit, which sends them"
                )
            worker.ready = ready
            self._stillborn.pop(worker.slot, None)
        except Exception as error:
            deaths = self._stillborn[worker.slot] = self._stillborn.get(worker.slot, 0) + 1
            self.lose(worker.number)
            if deaths < STILLBORN or not self.cluster.alive(worker.node):
                return
            text = f"workers on node {worker.node[:8]} end before they are ready: {error}"
            pause = backoff(BARREN_S, MOST_BARREN_S, deaths - STILLBORN)
            self._barren[worker.slot] = time.monotonic() + pause
            if not self._others_suffice:
                raise ClusterError(text) from error
            self.notice(f"{text}; it goes on without them, the next try is in {pause:g} s")

    def _look_at_keeper(self, keeper: PoolKeeper, now: float) -> None:
        try:
            if keeper.address is None:
                if not keeper.starting.done():
                    if not self.cluster.alive(keeper.node):
                        self._give_up(keeper.node)
                    elif now - keeper.heard > KEEPER_START_S:
                        raise Gone(f"no answer for {KEEPER_START_S:g} s")
                    return
                keeper.address = keeper.starting.result()
                keeper.heard = now
                self._unstarted.pop(keeper.node, None)
            if keeper.polling is not None and keeper.polling.done():
                self._told.reports += keeper.polling.result()
                keeper.polling, keeper.heard = None, now
            if keeper.polling is None:
                keeper.polling = keeper.handle.call("poll", POLL_S)
                keeper.polling.add_done_callback(self._wake)
            self._ask_for_usage(keeper, now)
            if now - keeper.heard > self.hang_s:
                keeper.handle.kill()
                raise Gone(f"no answer for {now - keeper.heard:.1f} s")
        except Gone as error:
            self.lose_keeper(keeper, str(error))

    def _ask_for_usage(self, keeper: PoolKeeper, now: float) -> None:
        if keeper.measuring is not None and keeper.measuring.done():
            with suppress(Exception):  # Figures for people; a keeper that is gone fails its poll, too.
                self._told.usage.append(NodeUsage(keeper.node, time.time(), keeper.measuring.result()))
            keeper.measuring = None
        if keeper.measuring is None and now - keeper.measured >= USAGE_S:
            keeper.measuring, keeper.measured = keeper.handle.call("usage"), now

    def _wake(self, answer: Future[Any]) -> None:
        if answer.exception() is not None or answer.result():  # A poll may come back with nothing to tell.
            self.news.set()

    # -- losses --------------------------------------------------------------------------------------------------------

    def lose(self, number: int) -> None:
        """Forget a worker that is dead or has to be; its slot gets another, if its node is alive."""
        if (worker := self.workers.pop(number, None)) is not None:
            worker.handle.kill()

    def lose_leaving(self) -> None:
        """Let those go that were asked to end; no generation needs them any more."""
        for worker in [worker for worker in self.workers.values() if worker.leaving]:
            self.lose(worker.number)

    def lose_keeper(self, keeper: PoolKeeper, reason: str) -> None:
        """Have another keeper started on the node, unless the cluster knows that it is dead.

        Raises:
            ClusterError: none ever starts there, nothing is trained yet, and other nodes are too few.
        """
        keeper.handle.kill()
        if self.keepers.get(keeper.node) is not keeper:
            return
        if keeper.address is not None:
            self._told.lost_keepers += 1
            self.notice(f"the keeper of node {keeper.node[:8]} is gone ({reason})")
        else:
            self._note_unstarted(keeper.node, reason)
        # A keeper that died alone comes back at once; on a dead node that the cluster still takes for alive, whatever
        # is started fails, and is tried again now and then.
        pause = backoff(REVIVE_S, MOST_REVIVE_S, self._unstarted.get(keeper.node, 0))
        self._orphans[keeper.node] = self._revived.get(keeper.node, 0.0) + pause
        del self.keepers[keeper.node]

    def _note_unstarted(self, node: str, reason: str) -> None:
        """Tell of a node on which no keeper starts; it is tried on, for the node may be dead and not known to be."""
        deaths = self._unstarted[node] = self._unstarted.get(node, 0) + 1
        if deaths == STILLBORN and self.cluster.alive(node):
            text = f"keepers on node {node[:8]} end before they answer: {reason}"
            if not self.training and not self._others_suffice:
                raise ClusterError(text)
            self.notice(f"{text}; nothing begins to train there until one does")

    def end(self, number: int, evidence: bool) -> "Future[str] | None":
        """Kill a worker through its node's keeper, at once and even if it is stopped; return what it was doing."""
        worker = self.workers.get(number)
        if worker is None:
            return None
        keeper = self.keepers.get(worker.node)
        told = keeper.handle.call("end", worker.ready.pid, evidence) if keeper and worker.ready else None
        if told is None:
            worker.handle.kill()
        return told
