"""Preparation by Ray tasks, a group of a source each: text and tokens are never in this process.

What a task makes depends on its group alone, so it does not matter which task makes it, how often, or on which node. A
task that dies is tried again; a preparation that ends begins again with the groups that nobody has finished.
"""

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

import ray

from orchestrator.group.cluster import connected, result_of
from orchestrator.stop import StopSignal
from workers.common.errors import StorageError
from workers.data.corpus import Corpus
from workers.data.prepare import Group, Work, prepare_work

Told = Callable[[Work, Group, dict[str, Any]], object]
"""Called when a group is done, with its note."""
WAIT_S = 0.5
TRIES, RETRY_S = 6, 2.0
"""Of a group whose storage fails, by its own task; the pause doubles each time."""
LOST = f"a task of the preparation was lost {TRIES} times"
AHEAD = 2
"""Tasks that are handed out per processor of the cluster: ten thousand at once would hold up all others."""


def prepare_on(works: Collection[Work], address: str | None, stop: StopSignal, told: Told) -> list[Corpus]:
    """Prepare sources by tasks on the cluster at `address`, or on a local Ray.

    Args:
        works: in the order of the config.
        address: of a Ray cluster; None starts a local one, unless RAY_ADDRESS is set.
        stop: tells when a person wants it to end; finished groups stay.
        told: shows what is done.

    Raises:
        ConfigError: more documents are bad than may be, or there are none.
        StorageError: a place cannot be read or written.
        ClusterError: the cluster cannot be reached, or loses too many tasks.
        Interrupted: a person has ended it.
    """
    with connected(address, stop):
        return [prepare_work(work, partial(_by_tasks, stop), told) for work in works]


def _by_tasks(
    stop: StopSignal, do: Callable[[Work, Group], Any], work: Work, groups: Iterable[Group]
) -> Iterator[tuple[Group, Any]]:
    """Do something with each group in a task of its own; yield each one that is done, and what came of it."""
    task = ray.remote(num_cpus=1, max_retries=TRIES, scheduling_strategy="SPREAD")(_patiently)
    shared, waiting, running = ray.put(work), [*groups][::-1], {}
    while waiting or running:
        room = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting and len(running) < room:
            group = waiting.pop()
            running[task.remote(do, shared, group)] = group
        done, _ = ray.wait(list(running), timeout=WAIT_S)
        stop.check()
        for reference in done:
            yield running.pop(reference), result_of(reference, LOST)


def _patiently(do: Callable[[Work, Group], Any], work: Work, group: Group) -> Any:
    """Do it, again where storage fails: a store that is away for a minute costs no more than that."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # A task has one processor.
    for attempt in range(TRIES):
        try:
            return do(work, group)
        except StorageError:
            if attempt == TRIES - 1:
                raise
            time.sleep(RETRY_S * 2**attempt)
    raise AssertionError("it has returned or raised")
