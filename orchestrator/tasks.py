"""Much independent work by Ray tasks, an item each.

What a task makes depends on its item alone, so it does not matter which task makes it, how often, or on which node; a
task that dies is tried again.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.stop import StopSignal
from workers.common.errors import ClusterError, DamagedError, RaymuonError, StorageError

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")
WAIT_S = 0.5
TRIES, RETRY_S = 6, 2.0
"""Of an item whose storage fails, by its own task; the pause doubles each time."""
AHEAD = 2
"""Tasks that are handed out per processor of the cluster: ten thousand at once would hold up all others."""


def by_tasks(
    do: Callable[[Shared, Item], Result],
    shared: Shared,
    items: Iterable[Item],
    stop: StopSignal,
    what: str,
    gpus: float = 0,
) -> Iterator[tuple[Item, Result]]:
    """Do something with each item in a task of its own, on the cluster that this process has joined.

    Args:
        do: a function of a module; it gets what is shared, and the item.
        shared: sent to each node once.
        items: in the order in which they are begun.
        stop: tells when a person wants it to end.
        what: the work, for the message about a task that is lost.
        gpus: that each task reserves, besides one processor.

    Yields:
        Each item that is done, and what came of it.

    Raises:
        ClusterError: a task was lost too often.
        RaymuonError: what a task has raised.
    """
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES, scheduling_strategy="SPREAD")(_patiently)
    reference, waiting, running = ray.put(shared), [*items][::-1], {}
    while waiting or running:
        room = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting and len(running) < room:
            item = waiting.pop()
            running[task.remote(do, reference, item)] = item
        done, _ = ray.wait(list(running), timeout=WAIT_S)
        stop.check()
        for one in done:
            yield running.pop(one), result_of(one, what)


def result_of(reference: Any, what: str, tries: int = TRIES) -> Any:
    """Return what a task has returned.

    Args:
        reference: to its result.
        what: the work, for the message about a task that is lost.
        tries: that it had.

    Raises:
        ClusterError: it was lost as often.
        RaymuonError: what it has raised.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RaymuonError):
            raise error.cause from error
        if isinstance(error.cause, RayError):  # It asked something of the cluster, as an actor that is gone.
            raise ClusterError(f"a task of the {what} has lost what it needs: {error.cause}") from error
        raise
    except RayError as error:
        raise ClusterError(f"a task of the {what} was lost {tries} times: {error}") from error


def _patiently(do: Callable[[Shared, Item], Result], shared: Shared, item: Item) -> Result:
    """Do it, again where storage fails: a store that is away for a minute costs no more than that."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # A task has one processor.
    for attempt in range(TRIES):
        try:
            return do(shared, item)
        except DamagedError:  # It stays so.
            raise
        except StorageError:
            if attempt == TRIES - 1:
                raise
            time.sleep(RETRY_S * 2**attempt)
    raise AssertionError("it has returned or raised")


def free_gpus() -> int:
    """Return how many GPUs of the cluster nobody has reserved now."""
    return int(ray.available_resources().get("GPU", 0))
