"""The members of one generation: their ranks and rendezvous, the stream of what they tell, and how they end."""

from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from orchestrator.group.handles import Gone
from orchestrator.group.pool import Pool
from orchestrator.group.processes import PoolWorker
from orchestrator.watchdog import Suspect, Watchdog
from workers.reports import Ended, Pulse, Report
from workers.task import KeeperLinks, Place, Task

POLL_S = 1.0
"""How long a worker holds a poll open when it has nothing to tell."""
SUSPECT_S = 1.0
"""How long a member may take to answer, once another one is known to be lost."""
EVIDENCE_S = 2.0
"""How long a keeper may take to tell what a member was doing, and to kill it."""
LEAVE_S = 4.0
"""How long a member that answers may take to leave a generation that has lost a member."""


class WorkerGroup:
    """One generation.

    Args:
        generation: its number.
        members: in rank order; all ready.
        pool: which they are of.
        watchdog: finds members that hang.
    """

    def __init__(self, generation: int, members: list[PoolWorker], pool: Pool, watchdog: Watchdog) -> None:
        self.generation, self.members, self.pool, self.watchdog = generation, members, pool, watchdog
        self.nodes = frozenset(member.node for member in members)
        self.ended: dict[int, Ended] = {}
        self.gone: dict[int, str] = {}
        """Why, for each rank whose process is dead or had to be killed."""
        self.stacks: dict[int, str] = {}
        """What members that had to be killed were doing."""
        self.told = -1
        """The last step whose row has come."""
        self._started: set[int] = set()
        """Ranks that were told to train: whoever was not has nothing to leave."""
        self._polls: dict[int, Future[Pulse]] = {}
        """By rank."""
        self._starts: dict[int, Future[None]] = {}
        """By rank, until they are answered."""
        self._answered: SimpleQueue[tuple[int, Future[Pulse]]] = SimpleQueue()
        self._links: dict[str, KeeperLinks] = {}
        self._shared: list[Any] = []
        """What members are given in common; there as long as the group is."""

    @property
    def world_size(self) -> int:
        """Members of the generation."""
        return len(self.members)

    @property
    def broken(self) -> bool:
        """Tell whether the generation cannot go on."""
        return bool(self.gone) or any(ended.outcome in ("lost", "failed") for ended in self.ended.values())

    @property
    def over(self) -> bool:
        """Tell whether nobody trains any more."""
        return not self._present()

    def start(self, task: Task, common: Place, links: dict[str, KeeperLinks]) -> None:
        """Form the group and let it train.

        Args:
            task: what to train.
            common: what is alike for all ranks in their places: with the task it is shared, for together they are
                megabytes, of each rank's part of the state.
            links: the keepers of each node's ranks.
        """
        self.watchdog.begin(range(self.world_size), self.pool.look())
        first = self.members[0]
        assert first.ready is not None
        try:
            opened: Future[int] = first.handle.call("open_rendezvous", self.generation, self.world_size)
            port = opened.result(timeout=self.watchdog.hang_s)
        except Exception as error:  # It is dead, does not answer, or has no port or file left.
            self._lose(0, str(error) or type(error).__name__)
            return
        self._links = links
        self._shared = [self.pool.cluster.share(it) for it in (replace(common, host=first.ready.host, port=port), task)]
        for rank, member in enumerate(self.members):
            self._starts[rank] = member.handle.call("start", rank, links[member.node], *self._shared)
            self._started.add(rank)
            self._poll(rank)

    def reports(self, timeout_s: float) -> list[Report]:
        """Return what the members have told, of this generation only; wait up to `timeout_s` for the first news.

        News is a report, of a member or of a keeper, or a loss. A mere heartbeat wakes nobody, for with a thousand
        members there is always one: it is taken in with the next news, or when the time is up.
        """
        self.pool.news.wait(timeout_s)
        self.pool.news.clear()  # Before the look, so that what comes during it is seen by the next one.
        now, found = self.pool.look(), []
        for rank in [rank for rank, start in self._starts.items() if start.done()]:
            if (error := self._starts.pop(rank).exception()) is not None:
                # It answers polls all the same, and would never train.
                self._lose(rank, str(error) or type(error).__name__)
        for _ in range(self._answered.qsize()):
            rank, poll = self._answered.get()
            if self._polls.get(rank) is not poll:
                continue  # Of a member that is lost.
            del self._polls[rank]
            try:
                pulse = poll.result()
            except Gone as error:
                self._lose(rank, str(error))
                continue
            found += [report for report in pulse.reports if report.generation == self.generation]
            current = pulse.mark if pulse.mark and pulse.mark.generation == self.generation else None
            self.watchdog.observe(rank, current, now)
            for report in pulse.reports:
                if isinstance(report, Ended) and report.generation == self.generation:
                    self.ended[rank] = report
                    self.watchdog.forget(rank)
            if rank not in self.ended:
                self._poll(rank)
        return found

    def pause(self, save: bool) -> None:
        """Ask the group to leave at the next boundary; one rank's word is enough, but it may die."""
        for member in self.members:
            member.handle.call("pause", self.generation, save)

    def relink(self, links: dict[str, KeeperLinks]) -> None:
        """Tell the members of keepers that have been replaced."""
        if links == self._links:
            return
        changed = {node for node, link in links.items() if self._links.get(node) != link}
        self._links = links
        for rank, member in enumerate(self.members):
            if member.node in changed and rank not in self.gone:
                member.handle.call("relink", self.generation, links[member.node])

    def kill(self, suspect: Suspect, evidence: bool) -> None:
        """End a member that hangs; with `evidence`, keep what it was doing in `stacks`."""
        told = self.pool.end(self.members[suspect.rank].number, evidence)
        if told is not None and evidence:
            text = "its keeper could not tell what it was doing"
            with suppress(Exception):
                text = told.result(timeout=EVIDENCE_S)
            self.stacks[suspect.rank] = f"{suspect.reason}\n\n{text}"
        self._lose(suspect.rank, suspect.reason)

    def settle(self) -> list[Report]:
        """Wait until every member is known to be out of the generation or dead; kill those that are neither.

        Members that live get out by themselves when a peer's sockets close. Whoever does not is pinged: no answer
        within a second means dead or cut off, and it is killed to free the others.
        """
        found: list[Report] = []
        began = self.pool.look()
        for rank in self._present():
            self.members[rank].handle.call("abort", self.generation)
        pings = {rank: self.members[rank].handle.call("ping") for rank in self._present()}
        freed = False
        while not self.over:
            found += self.reports(0.05)
            waited = self.pool.look() - began
            if waited > SUSPECT_S and not freed:
                freed = True
                for rank in [rank for rank, ended in self.ended.items() if ended.outcome == "failed"]:
                    # It has left, but something still holds its sockets open, and the others wait for it.
                    self.kill(Suspect(rank, "keeps its peers waiting after an error", waited), evidence=False)
            for rank in self._present():
                if waited > SUSPECT_S and not _answered(pings[rank]):
                    self.kill(Suspect(rank, "does not answer, after a peer was lost", waited), evidence=False)
                elif waited > LEAVE_S:
                    self.kill(Suspect(rank, "does not leave the generation, after a peer was lost", waited), True)
        return found

    def _present(self) -> list[int]:
        return sorted(self._started - self.gone.keys() - self.ended.keys())

    def _poll(self, rank: int) -> None:
        def answered(poll: Future[Pulse]) -> None:
            self._answered.put((rank, poll))
            if poll.exception() is not None or poll.result().reports:
                self.pool.news.set()

        poll: Future[Pulse] = self.members[rank].handle.call("poll", POLL_S, self.told)
        self._polls[rank] = poll
        poll.add_done_callback(answered)

    def _lose(self, rank: int, reason: str) -> None:
        self.gone.setdefault(rank, reason)
        self.watchdog.forget(rank)
        self.pool.lose(self.members[rank].number)
        self._polls.pop(rank, None)


def _answered(ping: "Future[bool]") -> bool:
    if not ping.done():
        return False
    with suppress(Exception):
        ping.result()
        return True
    return False
