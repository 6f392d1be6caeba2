"""The worker group: one actor per slot, their ranks and rendezvous, and one stream of their reports."""

from collections.abc import Iterator

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
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
        self.workers: list[ActorHandle] = [
            Worker.options(
                num_cpus=scaling.cpus_per_worker,
                num_gpus=1 if gpu else 0,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=slot),
            ).remote()
            for slot in slots
        ]
        self._polls: dict[ray.ObjectRef, int] = {}

    @property
    def world_size(self) -> int:
        """Workers in the group."""
        return len(self.workers)

    def prepare(self, storage: StorageConfig) -> list[ray.ObjectRef]:
        """Begin all workers' imports; the results are the addresses of their nodes."""
        return [worker.prepare.remote(storage) for worker in self.workers]

    def start(self, task: Task, addresses: list[ray.ObjectRef]) -> None:
        """Form a new generation and let it train.

        Raises:
            ClusterError: a worker died before it could begin.
        """
        self.generation += 1
        try:
            host = ray.get(addresses)[0]
            port = ray.get(self.workers[0].open_rendezvous.remote(self.generation, host, self.world_size))
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
            raise ClusterError(f"a worker could not start: {_first_line(error)}") from error
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
            except RayActorError as error:
                raise TrainingError(f"the worker of rank {rank} died: {_first_line(error)}") from error
            self._polls[self.workers[rank].reports.remote(POLL_S)] = rank
            yield from (report for report in reports if report.generation == self.generation)

    def pause(self) -> None:
        """Ask the group to save and end at the next boundary; one rank's word is enough."""
        self.workers[0].pause.remote()

    def kill(self) -> None:
        """End all worker processes at once."""
        for worker in self.workers:
            ray.kill(worker)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
