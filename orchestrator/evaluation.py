"""Evaluations by Ray tasks: models are never in this process.

A task has a GPU where the cluster has some. It tells what it finds as it goes, to a board that outlives it: a task that
dies is tried again, with what it had not done yet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.group.cluster import connected
from orchestrator.stop import StopSignal
from orchestrator.tasks import result_of
from workers.common.errors import ClusterError

WAIT_S = 0.5
UNWIND_S = 5.0
"""For tasks that are ended to take away what they have laid down."""
TRIES = 3
"""Of a task whose process or node is lost."""

Tell = Callable[[Any, str], None]
"""Takes a note, and the place that is done with it; empty where none is."""
Do = Callable[[Sequence[str], Tell], None]
"""Does what there is to do with some places, and tells of it."""


@dataclass(frozen=True)
class Begun:
    """The first note: what was asked of the cluster, which may have to wait for it."""

    tasks: int
    gpu: bool
    """Each has one; else a processor."""


@dataclass(frozen=True)
class BegunAgain:
    """A task was lost, and is tried again with what it had not done yet."""

    places: tuple[str, ...]


class _Board:
    """Keeps what tasks tell until the driver takes it."""

    def __init__(self) -> None:
        self.notes: list[Any] = []
        self.begun: set[str] = set()
        self.done: set[str] = set()

    def begin(self, share: Sequence[str]) -> list[str]:
        """Return the places of a share that are not done yet."""
        left = [place for place in share if place not in self.done]
        if not self.begun.isdisjoint(share):
            self.notes.append(BegunAgain(tuple(left)))
        self.begun |= set(share)
        return left

    def put(self, note: Any, done: str) -> None:
        """Take a note, and a place that is done with it."""
        self.notes.append(note)
        self.done.add(done)

    def take(self) -> list[Any]:
        """Give the notes away."""
        notes, self.notes = self.notes, []
        return notes


def evaluate_on(
    do: Do, places: Sequence[str], address: str | None, stop: StopSignal, told: Callable[[Any], object]
) -> None:
    """Do something with places by tasks on the cluster at `address`, or on a local Ray.

    Args:
        do: pickled.
        places: shared out among as many tasks as there are GPUs; without GPUs, processors.
        address: of a Ray cluster; None starts a local one, unless RAY_ADDRESS is set.
        stop: tells when a person wants it to end.
        told: called with each note.

    Raises:
        RaymuonError: what a task has raised.
        ClusterError: the cluster cannot be reached, or loses a task again and again.
        Interrupted: a person has ended it.
    """
    with connected(address, stop) as joined:
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        shares = [one for number in range(gpus or cpus) if (one := places[number :: gpus or cpus])]
        # A local Ray is this command's alone; elsewhere others may be at work.
        each = max(1, cpus // len(shares)) if joined.local and not gpus else 1
        board = _board()
        # A process of its own: what lm-eval's libraries read of the environment they read once.
        own = ray.remote(num_cpus=each, num_gpus=1 if gpus else 0, max_retries=TRIES - 1, max_calls=1)
        task = own(_telling)
        told(Begun(len(shares), gpus > 0))
        running = [task.remote(do, share, board) for share in shares]
        try:
            while running:
                done, running = ray.wait(running, timeout=WAIT_S)
                stop.check()
                for note in _taken(board):
                    told(note)
                for reference in done:
                    result_of(reference, "evaluation", TRIES)
        finally:
            _end(running)


def _board() -> Any:
    """Start a board on this node: while the driver lives, it does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return cast(Any, ray.remote(num_cpus=0)(_Board)).options(scheduling_strategy=here).remote()


def _taken(board: Any) -> list[Any]:
    try:
        return ray.get(board.take.remote())
    except RayError as error:
        raise ClusterError(f"the process that keeps the figures of the evaluation was lost: {error}") from error


def _end(running: Sequence[Any]) -> None:
    """End tasks as Ctrl-C would, so that they leave nothing behind; those that do not hear it end with Ray."""
    for reference in running:
        ray.cancel(reference)
    if running:
        ray.wait(list(running), num_returns=len(running), timeout=UNWIND_S)


def _telling(do: Do, share: Sequence[str], board: Any) -> None:
    do(ray.get(board.begin.remote(share)), lambda note, done: ray.get(board.put.remote(note, done)))
