"""Branches of a run that still trains in this process: they begin out of its keepers' memory, and read no storage.

Whoever leads both makes a `Living`, hands it to the parent (`Options.living`), waits for a step, and hands what that
returns to the branch (`Options.branch`):

    living = Living({600: 2})
    ...  run_on(joined, parent, "never", watcher, stop, Options(living=living)), in a thread of its own
    point = living.wait(600)
    ...  run_on(joined, branch, "never", watcher, stop, Options(branch=point)), as often as was told

A step counts for branches when its checkpoint does, which is theirs to fall back on: the memory is the parent's, and
goes with it, with the keeper of a node, or when all branches of the step have begun.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass

from orchestrator.config import RunConfig
from orchestrator.group.handles import Gone
from orchestrator.group.pool import Pool
from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError
from workers.snapshots.kept import KeptShard, Snapshot
from workers.task import Origin

LOOK_S = 0.1
"""Between two looks at whether somebody who waits still wants to."""
ANSWER_S = 1.0
"""How long a keeper may take to tell what it holds."""


class Living:
    """The steps of a run after which branches begin while it trains.

    Args:
        branches: how many begin after each step.
    """

    def __init__(self, branches: Mapping[int, int]) -> None:
        self.steps = tuple(sorted(branches))
        self._left = dict(branches)
        self._points: dict[int, tuple[Origin, Snapshot | None]] = {}
        self._news = threading.Condition()
        self._ended = False
        self._begun_after = 0
        self._pool: Pool | None = None

    def wait(self, step: int, check: Callable[[], object] = lambda: None) -> "BranchPoint | None":
        """Wait until the run's checkpoint of a step counts, and return where a branch begins.

        Args:
            step: one of `steps`.
            check: called again and again meanwhile; raises where nobody wants to wait any longer.

        Returns:
            None where there will be no such checkpoint while the run trains: it has ended before, or has gone on from a
            later one. Then a branch begins with what is in storage, if it is there (`train.init=RUN@STEP`).
        """
        with self._news:
            while step not in self._points and not self._ended and step > self._begun_after:
                check()
                self._news.wait(LOOK_S)
            point = self._points.get(step)
        return BranchPoint(*point, self) if point else None

    def check(self, config: RunConfig) -> None:
        """Refuse a parent that does not make the checkpoints that branches fall back on.

        Raises:
            ConfigError: with the steps.
        """
        made = {config.train.steps, *config.train.ends, *config.checkpoint.at}
        if missing := [step for step in self.steps if step not in made]:
            raise ConfigError(
                f"checkpoint.at={list(config.checkpoint.at)}: branches begin after {', '.join(map(str, missing))}, and "
                "fall back on a checkpoint of that step; add it"
            )

    # -- the run's side ------------------------------------------------------------------------------------------------

    def begin(self, pool: Pool, reached: int) -> None:
        """The run trains with a pool, and goes on from a step."""
        pool.hold(tuple(step for step in self.steps if step > reached))
        with self._news:
            self._pool, self._begun_after = pool, reached
            self._news.notify_all()

    def committed(self, run_url: str, manifest: Manifest) -> int:
        """A checkpoint of the run counts; return the bytes of memory in which its snapshot stays."""
        if manifest.step not in self.steps or self._pool is None:
            return 0
        snapshot = _held(self._pool, manifest)
        with self._news:
            self._points[manifest.step] = Origin(run_url=run_url, manifest=manifest), snapshot
            self._news.notify_all()
        return sum(shard.size.values for shard in snapshot.shards) if snapshot else 0

    def end(self) -> None:
        """The run trains no more, and its keepers' memory goes."""
        with self._news:
            self._ended, self._pool = True, None
            self._news.notify_all()

    # -- a branch's side -----------------------------------------------------------------------------------------------

    def began(self, step: int) -> None:
        """One branch of a step has its state, or needs it no more; with the last one its memory goes."""
        with self._news:
            self._left[step] -= 1
            if self._left[step]:
                return
            self._points[step] = self._points[step][0], None
            pool = self._pool
        if pool is not None:
            pool.release_held(step)

    @property
    def ended(self) -> bool:
        """Tell whether the run trains no more."""
        return self._ended


@dataclass
class BranchPoint:
    """Where one branch begins: a checkpoint, and the same in the keepers' memory of the run that made it."""

    origin: Origin
    snapshot: Snapshot | None
    """None where it is in storage alone."""
    living: Living
    _done: bool = False

    @property
    def init(self) -> str:
        """Return the value of `train.init` that says the same."""
        return f"{self.origin.run_url}@{self.origin.manifest.step}"

    @property
    def in_memory(self) -> Snapshot | None:
        """Return the snapshot, as far as it is known that it is still there."""
        return None if self.living.ended else self.snapshot

    def done(self) -> None:
        """A branch has begun, or will not."""
        if not self._done:
            self._done = True
            self.living.began(self.origin.manifest.step)


def _held(pool: Pool, manifest: Manifest) -> Snapshot | None:
    """Return the snapshot of a checkpoint that the keepers hold; None where a part of it went with a keeper."""
    asked: list[Future[list[KeptShard]]] = [
        keeper.handle.call("held", manifest.generation, manifest.step) for keeper in pool.keepers.values()
    ]
    shards: list[KeptShard] = []
    for answer in wait(asked, ANSWER_S).done:
        with suppress(Gone):
            shards += answer.result()
    if {shard.rank for shard in shards} != set(range(manifest.world_size)):
        return None
    return Snapshot(
        generation=manifest.generation,
        step=manifest.step,
        world_size=manifest.world_size,
        counters=manifest.counters,
        shards=tuple(shards),
    )
