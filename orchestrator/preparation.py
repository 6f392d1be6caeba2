"""Preparation by Ray tasks, a group of a source each: text and tokens are never in this process.

A preparation that ends begins again with the groups that nobody has finished.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from orchestrator.group.cluster import connected
from orchestrator.stop import StopSignal
from orchestrator.tasks import by_tasks
from workers.data.corpus import Corpus
from workers.data.prepare import Group, Work, prepare_work

Told = Callable[[Work, Group, dict[str, Any]], object]
"""Called when a group is done, with its note."""


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

    def in_tasks(do: Callable[[Work, Group], Any], work: Work, groups: Iterable[Group]) -> Iterator[tuple[Group, Any]]:
        return by_tasks(do, work, groups, stop, "preparation")

    with connected(address, stop):
        return [prepare_work(work, in_tasks, told) for work in works]
