"""The worker group: one actor per slot, their ranks and rendezvous, and one stream of their reports."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.config import ScalingConfig
from workers.actor import Worker
from workers.config import StorageConfig
from workers.errors import ClusterError, TrainingError
from workers.reports import Report
from workers.task import Membership, Task

POLL_S = 10.0
"""How long a worker holds a poll open when it has nothing to tell."""


class WorkerGroup:
    """The workers of a run, in rank order."""

    def __init__(self, slots: list[PlacementGroup], scaling: ScalingConfig, gpu: bool) -> None:
        self.generation = 0
        self.workers: list[Any] = [  # Ray's actor handles have no useful type.
            Worker.options(
                num_cpus=scaling.cpus_per_worker,
                num_gpus=1 if gpu else 0,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=slot),
            ).remote()
            for slot in slots
        ]
        self._addresses: list[ray.ObjectRef] = []
        self._polls: dict[ray.ObjectRef, int] = {}

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End all worker processes at once."""
        for worker in self.workers:
            ray.kill(worker)

    @property
    def world_size(self) -> int:
        """Workers in the group."""
        return len(self.workers)

    def prepare(self, storage: StorageConfig) -> None:
        """Begin all workers' imports."""
        self._addresses = [worker.prepare.remote(storage) for worker in self.workers]

    def prepared(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` and tell whether every worker has imported what it needs, or has failed."""
        done, _ = ray.wait(self._addresses, num_returns=len(self._addresses), timeout=timeout_s)
        return len(done) == len(self._addresses)

    def start(self, task: Task) -> None:
        """Form a new generation and let it train.

        Raises:
            ClusterError: a worker died before it could begin.
        """
        self.generation += 1
        try:
            host = ray.get(self._addresses)[0]
            port: Any = ray.get(self.workers[0].open_rendezvous.remote(self.generation, host, self.world_size))
            ray.get(
                [
                    worker.start.remote(
                        Membership(
                            generation=self.generation, rank=rank, world_size=self.world_size, host=host, port=port
                        ),
                        task,
                    )
                    for rank, worker in enumerate(self.workers)
                ]
            )
        except RayError as error:
            raise ClusterError(f"a worker could not start: {_reason(error)}") from error
        self._polls = {worker.reports.remote(POLL_S): rank for rank, worker in enumerate(self.workers)}

    def reports(self, timeout_s: float) -> Iterator[Report]:
        """Yield what the workers have told, of this generation only; wait up to `timeout_s` for the first.

        Raises:
            TrainingError: a worker's process is gone.
        """
        done, _ = ray.wait(list(self._polls), num_returns=1, timeout=timeout_s)
        for poll in done:
            rank = self._polls.pop(poll)
            try:
                reports = ray.get(poll)
            except RayError as error:
                raise TrainingError(f"the worker of rank {rank} died: {_reason(error)}") from error
            self._polls[self.workers[rank].reports.remote(POLL_S)] = rank
            yield from (report for report in reports if report.generation == self.generation)

    def pause(self) -> None:
        """Ask the group to save and end at the next boundary; one rank's word is enough."""
        self.workers[0].pause.remote()


def _reason(error: RayError) -> str:
    """Return one line: Ray wraps what a worker raised into the worker's whole traceback."""
    cause = getattr(error, "cause", None)
    return f"{type(cause).__name__}: {cause}" if cause else str(error).strip().splitlines()[0]
