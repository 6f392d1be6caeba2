"""A worker and a keeper of a run, as the pool knows them from their start on."""

import math
from concurrent.futures import Future
from dataclasses import dataclass

from orchestrator.group.handles import Handle
from workers.common.wire import Address
from workers.member import Ready
from workers.reports import Report


@dataclass(eq=False)
class PoolWorker:
    """A worker process, from its start on."""

    number: int
    slot: str
    node: str
    handle: Handle
    preparing: Future[Ready]
    ready: Ready | None = None
    leaving: bool = False
    """It was asked to end, and trains on until the group leaves it behind."""


@dataclass(eq=False)
class PoolKeeper:
    """A node's keeper, from its start on."""

    node: str
    handle: Handle
    starting: Future[Address]
    address: Address | None = None
    polling: Future[list[Report]] | None = None
    heard: float = 0.0
    """On the driver's clock of attention."""
    measuring: Future[dict[str, float]] | None = None
    measured: float = -math.inf
    """When its node's usage was asked for last."""
