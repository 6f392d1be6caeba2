"""One driver's attempt at a run: generation after generation, until the last step, a stop, or a fault too many.

A generation is formed out of the workers that are ready, goes on from the newest snapshot in the keepers' memory (from
storage only if no copy is left), and lasts until training ends, the group has to change, or it loses a member. Then the
next one is formed. The controller decides; what it decides by is in `policy`, how processes are reached in `pool`, and
what becomes of all that they tell in `intake`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

from orchestrator.config import RunConfig
from orchestrator.generation import Change, Decide, Generation, plainly
from orchestrator.group.pool import Pool
from orchestrator.group.processes import PoolKeeper, PoolWorker
from orchestrator.group.worker_group import WorkerGroup
from orchestrator.intake import Intake
from orchestrator.living import BranchPoint
from orchestrator.log.commits import Commits
from orchestrator.log.lease import Lease
from orchestrator.policy import FaultKind, GiveUp, buddies, choose_members, diagnose, restart, should_grow
from orchestrator.record.events import Fault, Membership
from orchestrator.record.progress import Progress, Recorder
from orchestrator.stop import StopSignal
from orchestrator.watchdog import Suspect, Watchdog
from workers.common.errors import ClusterError, RaymuonError, StorageError
from workers.task import KeeperLinks, Place, Task

COMMIT_S = 600.0
"""How long to wait for each next part of the last checkpoint, as long as its keepers live."""
SLOW_LOOK_S = 5.0


class Controller:
    """Leads a run.

    Args:
        config: of the run.
        pool: the processes; they may still be starting.
        commits: turns shards into checkpoints.
        task: what to train; its manifest is where to go on from.
        progress: what the record has already.
        recorder: is told everything.
        lease: the right to lead it.
        stop: tells when a person wants it to end.
        kill_after: for demonstrations: SIGKILL one worker after this step.
        decide: decides what is automatic, for each generation anew: fewer workers need more memory each.
        branch: where the run begins, if that is in a living run.
    """

    def __init__(
        self,
        config: RunConfig,
        pool: Pool,
        commits: Commits,
        task: Task,
        progress: Progress,
        recorder: Recorder,
        lease: Lease,
        stop: StopSignal,
        kill_after: int | None = None,
        decide: Decide = plainly,
        branch: BranchPoint | None = None,
    ) -> None:
        self.config, self.pool, self.lease, self.stop = config, pool, lease, stop
        self.progress, self.recorder, self.kill_after, self.decide = progress, recorder, kill_after, decide
        self.branch = branch
        self.intake = Intake(config, pool, commits, task, progress, recorder)
        self.policy, self.saves = self.intake.policy, self.intake.saves
        self.watchdog = Watchdog(config.recovery.hang_s)
        self.outcome = ""
        self.ended_at = progress.step
        self._hung: tuple[str, float] | None = None
        self._spare_since: float | None = None
        self._looked_for_slow = 0.0

    @property
    def generation(self) -> Generation:
        """The generation that is being led, or the last one."""
        return self.intake.generation

    def run(self) -> str:
        """Train to the end and return `finished`, or `interrupted` after a stop with a checkpoint.

        Raises:
            RaymuonError: with the exit code of what went wrong.
        """
        while not self.outcome:
            members = self._assemble()
            if self.stop.requests and self._end_without_group():
                break
            if not members:
                raise self.stop.interrupted(self._kept("interrupted while too few workers were there"))
            self._lead(self._form(members))
        return self.outcome

    # -- forming a generation ------------------------------------------------------------------------------------------

    def _assemble(self) -> list[PoolWorker]:
        """Wait until enough workers are ready, and choose; after a request to stop, perhaps none."""
        scaling = self.config.scaling
        self.pool.lose_leaving()

        def choose() -> list[int]:
            return choose_members(self.pool.candidates, self.generation.members, scaling) or []

        def enough() -> bool:
            """The first generation waits for workers that are about to be ready, too."""
            chosen = len(choose())
            complete = self.generation.number or chosen == scaling.max_workers or not self.pool.num_starting
            return bool(self.stop.requests or (chosen and complete))

        if not self._wait(enough, 0.0):
            if self.generation.number:
                self.recorder.notice(f"waiting for {scaling.min_workers} worker(s) to be ready")
            self._wait(enough, scaling.wait_s)
        chosen = choose()
        if not chosen and not self.stop.requests:
            raise ClusterError(
                self._kept(
                    f"scaling.min_workers={scaling.min_workers}: after {scaling.wait_s:g} s "
                    f"{len(self.pool.candidates)} worker(s) are ready"
                )
            )
        return [self.pool.workers[number] for number in chosen]

    def _form(self, members: list[PoolWorker]) -> WorkerGroup:
        """Give out a new generation and let it begin."""
        reason = self.intake.change.reason if self.intake.change else "start"
        self.generation.number += 1
        nodes = [member.node for member in members]
        # In a living run's memory it is looked for once: whatever fails there, the same is in storage.
        living = self.branch.in_memory if self.branch and self.generation.number == 1 else None
        begin = restart(living or self.intake.newest_snapshot(), self.saves.task.manifest)
        if begin.snapshot is not None and begin.snapshot is not living:
            for keeper in self.pool.keepers.values():
                keeper.handle.call("drop", begin.snapshot.generation)
        self.intake.generation = generation = Generation(
            number=self.generation.number,
            members=[member.number for member in members],
            source=begin.source,
            restored=begin.step,
            redone=max(0, max(self.progress.step, self.progress.seen) - begin.step),
            reached=begin.step,
        )
        devices = tuple(sorted({member.ready.device for member in members if member.ready}))
        train = self.decide(self.config, nodes, devices)
        group = WorkerGroup(generation.number, members, self.pool, self.watchdog)
        group.told = self.progress.step
        self.recorder.event(
            Membership(
                **self.intake.now(),
                generation=generation.number,
                world_size=len(members),
                previous_world_size=self.progress.world_size,
                reason=reason,
                nodes=tuple(nodes),
                pids=tuple(member.ready.pid for member in members if member.ready),
                devices=devices,
                source=begin.source,
                restored_step=begin.step,
                chosen={key: getattr(train, key) for key in self.config.train.open},
            )
        )
        self.progress.world_size = len(members)
        place = Place(
            generation=generation.number,
            rank=0,
            world_size=len(members),
            host="",
            port=0,
            snapshot=begin.snapshot,
            validated=self.progress.validated,
            committed=self.progress.committed,
            tell_plan=not self.intake.planned,
        )
        group.start(replace(self.saves.task, train=train), place, self._links(group))
        self.pool.training = True
        return group

    def _end_without_group(self) -> bool:
        """End the run while nobody trains: the keepers write what the last generation has left with them.

        Returns:
            False if a part is only a copy with another node's keeper, or went meanwhile: then it takes a generation.
        """
        self.generation.number += 1  # Keepers listen to the last one no more.
        snapshot = self.intake.newest_snapshot()
        self.ended_at = max(0, self.progress.committed)
        if snapshot is not None and snapshot.step > self.ended_at:
            self.recorder.notice(f"stopping, with a checkpoint of step {snapshot.step}; once more ends at once")
            self.saves.expect(snapshot.generation, snapshot.step)
            what = snapshot.generation, snapshot.step, snapshot.counters
            where = self.saves.task.run_url, self.saves.task.attempt
            asked = {
                node: (keeper, keeper.handle.call("save", *what, *where))
                for node, keeper in self.pool.keepers.items()
                if keeper.address
            }
            self._wait(lambda: all(answer.done() for _, answer in asked.values()))
            ranks = {rank for _, answer in asked.values() if not answer.exception() for rank in answer.result()}
            if len(ranks) < snapshot.world_size:
                return False
            self.ended_at = snapshot.step
            kept = lambda: all(self.pool.keepers.get(node) is keeper for node, (keeper, _) in asked.items())  # noqa: E731
            if not self._await_commit(kept, snapshot.generation):
                return False
        self.outcome = "interrupted"
        return True

    def _links(self, group: WorkerGroup) -> dict[str, KeeperLinks]:
        """Return the keepers of the ranks on each node."""
        buddy = buddies(node for node in group.nodes if self.pool.keeper_of(node))
        return {
            node: KeeperLinks(keeper=self.pool.keeper_of(node), buddy=self.pool.keeper_of(buddy.get(node)))
            for node in group.nodes
        }

    # -- leading it ----------------------------------------------------------------------------------------------------

    def _lead(self, group: WorkerGroup) -> None:
        """Listen to a generation until it is over, and find out what comes next."""
        leaving: Change | None = None
        stopping, keepers = False, self._keepers(group)
        while not group.over and not group.broken:
            if not group.ended:  # From then on a checkpoint may be with them that nobody else has.
                keepers = self._keepers(group)
            reports = group.reports(0.1)
            # Before anything else: what follows may wait for MLflow or storage, and silence meanwhile is our own.
            for suspect in self.watchdog.suspects(self.pool.look()):
                self._end_hung(group, suspect)
            self.intake.take(reports)
            if self.branch is not None and self.generation.in_step:
                self.branch.done()
            group.told = self.progress.step
            self.pool.refresh()
            self._look_after()
            group.relink(self._links(group))
            self._look_for_slow()
            self._demonstrate(group)
            if self.stop.requests and not stopping and leaving is None:
                stopping = True  # Otherwise the next generation stops, and saves.
                self.recorder.notice("stopping after this step, with a checkpoint; once more ends at once")
                group.pause(save=True)
            elif not stopping and leaving is None and (leaving := self._wants_change(group)) is not None:
                group.pause(save=leaving.reason == "preemption" and self._too_few_stay)
        if group.broken:
            self._recover(group)
            return
        ended = next(iter(group.ended.values()))
        outcome, self.ended_at = ended.outcome, ended.step
        if outcome == "paused" and not stopping:
            self._after_change(group, leaving or Change("grow"))
        elif self._await_commit(lambda: self._keepers(group) == keepers, group.generation):
            self.outcome = "finished" if outcome == "finished" else "interrupted"
        else:
            self._recover(group)

    def _wants_change(self, group: WorkerGroup) -> Change | None:
        """Return why the group should be formed anew at the next boundary, if it should."""
        numbers = {member.number for member in group.members}
        if leaving := [rank for rank, member in enumerate(group.members) if member.leaving]:
            return Change("preemption", f"rank {leaving[0]} was asked to end (SIGTERM)")
        going = [member.node for member in group.members if member.node in self.pool.draining]
        if going:
            return Change("preemption", f"node {going[0][:8]} goes away in {self.pool.draining[going[0]]:.0f} s")
        spare = [worker for worker in self.pool.free if worker.number not in numbers]
        if not spare or not self.generation.begun or self.generation.reached + 2 >= self.saves.task.last_step:
            self._spare_since = None
            return None
        self._spare_since = self._spare_since or time.monotonic()
        waited = time.monotonic() - self._spare_since
        if should_grow(len(numbers), len(spare), self.pool.num_starting, waited, self.config.scaling):
            return Change("grow", f"{len(spare)} more worker(s) are ready")
        return None

    @property
    def _too_few_stay(self) -> bool:
        """Tell whether the group has to wait for others, perhaps for long, once those that go are gone."""
        return len(self.pool.candidates) < self.config.scaling.min_workers

    def _after_change(self, group: WorkerGroup, change: Change) -> None:
        """All have left at a boundary: the next generation goes on from there."""
        self._spare_since = None
        # One that is still being recovered from counts from its beginning.
        began = self.intake.change.began if self.intake.change else max(ended.time for ended in group.ended.values())
        self.intake.change = change = Change(change.reason, change.cause, began)
        if change.reason == "preemption":
            self._budget("preemption", change.cause, None)

    def _keepers(self, group: WorkerGroup) -> dict[str, PoolKeeper | None]:
        """Return who keeps the shards of each node."""
        return {node: self.pool.keepers.get(node) for node in group.nodes}

    def _await_commit(self, kept: Callable[[], bool], generation: int) -> bool:
        """Wait for the checkpoint that ends the run; False if it is not with its keepers any more."""
        step = self.ended_at
        self.intake.heard_of_save = time.monotonic()

        def decided() -> bool:
            if self.progress.committed >= step or (not kept() and not self.saves.needs_no_keeper(generation, step)):
                return True
            if (error := self.saves.given_up.get((generation, step))) is not None:
                raise StorageError(error)
            if time.monotonic() > self.intake.heard_of_save + COMMIT_S:
                raise StorageError(f"the checkpoint of step {step}: no part of it was written for {COMMIT_S:g} s")
            return False

        self._wait(decided)
        return self.progress.committed >= step

    # -- faults --------------------------------------------------------------------------------------------------------

    def _recover(self, group: WorkerGroup) -> None:
        """Find out who is left, and decide whether and when to go on.

        Raises:
            RaymuonError: this was one fault too many, or one that would come again.
        """
        found_at = time.time()
        self.intake.take(group.settle())
        for rank, text in group.stacks.items():
            self.recorder.stack(f"generation-{group.generation}-rank-{rank}", text)
        for rank, ended in group.ended.items():
            if ended.broken:
                self.pool.lose(group.members[rank].number)
        found = diagnose(group.ended, group.gone, [member.node for member in group.members], found_at)
        if self._hung is not None:
            found = replace(found, seen="hung", cause=self._hung[0], began=self._hung[1])
            self._hung = None
        self.recorder.event(
            Fault(
                **self.intake.now(),
                kind=found.seen,
                cause=found.cause,
                generation=group.generation,
                during_recovery=not self.generation.in_step,
                ranks=found.ranks,
                began=found.began,
            )
        )
        if found.error is not None:
            raise self._ending(found.error)
        # A second fault while the first is being recovered from counts from the first.
        change, generation = self.intake.change, self.generation
        since = change.began if change is not None and change.reason != "start" else found.began
        self.intake.change = Change("fault", found.cause, since)
        in_training = generation.in_step and generation.reached < self.saves.task.last_step
        next_step = generation.reached + 1 if in_training else None
        delay = self._budget(found.kind, found.cause, next_step)
        if delay:
            self.recorder.notice(f"trying again in {delay:g} s: {found.cause}")
            self._wait(lambda: bool(self.stop.requests), delay)

    def _budget(self, kind: FaultKind, cause: str, step: int | None) -> float:
        decision = self.policy.fault(kind, cause, time.monotonic(), step)
        if isinstance(decision, GiveUp):
            raise self._ending(decision.error)
        return decision.delay_s

    def _end_hung(self, group: WorkerGroup, suspect: Suspect) -> None:
        member = group.members[suspect.rank]
        cause = f"rank {suspect.rank} on node {member.node[:8]} {suspect.reason}"
        self._hung = cause, time.time() - suspect.since_s
        group.kill(suspect, evidence=True)

    def _look_for_slow(self) -> None:
        if time.monotonic() - self._looked_for_slow > SLOW_LOOK_S:
            self._looked_for_slow = time.monotonic()
            self.recorder.slow(self.watchdog.slow())

    def _demonstrate(self, group: WorkerGroup) -> None:
        if self.kill_after is not None and self.progress.step >= self.kill_after and group.world_size > 1:
            self.kill_after = None
            self.recorder.notice(f"--kill-worker: rank {group.world_size - 1} is killed now")
            self.pool.end(group.members[-1].number, evidence=False)

    def _wait(self, until: Callable[[], bool], seconds: float = math.inf) -> bool:
        """Wait for something while no group is led, and look after everything else meanwhile."""
        return self.pool.wait(until, self._look_after, seconds)

    def _look_after(self) -> None:
        """Find out whether the run is still ours to lead, and take in what the pool knows."""
        self.stop.check()
        self.lease.check()
        self.intake.look_after_pool()

    def _ending(self, error: RaymuonError) -> RaymuonError:
        """Return the error that ends the run, with what is left of it."""
        return type(error)(self._kept(str(error)))

    def _kept(self, text: str) -> str:
        kept = self.progress.committed
        return f"{text}; " + (f"the checkpoint of step {kept} is kept" if kept > 0 else "there is no checkpoint yet")
