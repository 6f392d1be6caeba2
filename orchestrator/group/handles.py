"""What a run needs of a cluster: slots on nodes, and processes that can be called and killed.

Ray is one such cluster (`orchestrator.group.cluster`); the chaos tests bring another, of plain local processes.
"""

from concurrent.futures import Future
from typing import Any, Protocol

from orchestrator.config import ScalingConfig
from workers.config import StorageConfig


class Gone(Exception):
    """The process that was called is dead, or out of reach."""


class Handle(Protocol):
    """A process that runs one object."""

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method; the future raises Gone, or what the method raised."""
        ...

    def kill(self) -> None:
        """End the process, if it is there; does not wait."""
        ...


class Cluster(Protocol):
    """Nodes with room for the workers of one run. Slots and nodes are named by strings."""

    bundle: dict[str, float]
    """What a slot takes of its node."""

    def room(self) -> int:
        """Return how many workers the nodes could hold if they were empty."""
        ...

    def reserve(self) -> str:
        """Ask for one more slot; it is pending until the cluster has room, and the demand that an autoscaler sees."""
        ...

    def node_of(self, slot: str) -> str | None:
        """Return the node on which a slot is, None while it is pending."""
        ...

    def release(self, slot: str) -> None:
        """Give a slot back, pending or not."""
        ...

    def hand_back(self, slot: str, worker: Handle) -> None:
        """Give a slot back together with the worker in it, which is ready and needed no more."""
        ...

    def start_worker(self, slot: str) -> Handle:
        """Start a `Member` in a slot, or have one go on there that another run has handed back."""
        ...

    def start_keeper(self, node: str, token: str, storage: StorageConfig) -> Handle:
        """Start a `Keeper` on a node, or have one begin anew there that another run has handed back."""
        ...

    def hand_back_keeper(self, node: str, keeper: Handle) -> None:
        """Give back a keeper that is well and needed no more."""
        ...

    def share(self, value: Any) -> Any:
        """Return what a call can have in the place of an argument; the value then travels once, not with every call."""
        ...

    def alive(self, node: str) -> bool:
        """Tell whether the cluster takes the node for alive; it may learn of a death seconds late."""
        ...

    def draining(self) -> dict[str, float]:
        """Return the nodes that will go away, and the seconds until then."""
        ...


class Joined(Protocol):
    """A cluster that this process has joined. Any number of runs may use it at the same time, from any thread."""

    def slots(self, scaling: ScalingConfig) -> Cluster:
        """Return the cluster as a run of this size sees it.

        Raises:
            ClusterError: it will never have room for its minimum.
        """
        ...
