"""How the step loop and the process that runs it talk to each other. Without torch."""

from collections.abc import Callable
from dataclasses import dataclass

from workers.phases import Phase
from workers.task import KeeperLinks


@dataclass(frozen=True)
class Pause:
    """What somebody asks of this process at the next boundary: nothing, to leave, or to save and leave."""

    leave: bool = False
    save: bool = False


@dataclass(frozen=True)
class Controls:
    """How the loop and whoever runs it talk. Nothing in here may block.

    `report` takes a report's class and its fields. `mark` is told where the loop is, for the watchdog. `told` returns
    the last step whose row the driver has, and `links` this node's keeper and its buddy.
    """

    report: Callable[..., None] = lambda kind, **fields: None
    mark: Callable[[Phase, int], None] = lambda phase, step: None
    busy: Callable[[float], None] = lambda seconds: None
    pause: Callable[[], Pause] = Pause
    told: Callable[[], int] = lambda: -1
    links: Callable[[], KeeperLinks] = KeeperLinks
    keeper_lost: Callable[[str], None] = lambda error: None
