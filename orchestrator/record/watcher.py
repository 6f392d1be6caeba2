"""Whoever watches a run while it is led: a terminal, or nobody."""

from typing import Protocol

from orchestrator.record.events import Event
from workers.recipe import Recipe
from workers.reports import Report


class Watcher(Protocol):
    """Whoever shows a run to a person; called from the driver's loop, so it must be quick. This one shows nothing."""

    def phase(self, text: str) -> None:
        """A part of the start has begun."""

    def warn(self, text: str) -> None:
        """Something is wrong that does not end the run."""

    def page(self, tracking_uri: str, path: str) -> None:
        """MLflow shows the run at that path of its UI."""

    def begin(self, run_id: str, first_step: int, last_step: int, world_size: int, recipe: Recipe) -> None:
        """Training begins after `first_step`, by a recipe that may go on beyond `last_step`."""

    def report(self, report: Report) -> None:
        """A worker told something."""

    def event(self, event: Event) -> None:
        """The group changed, or something went wrong."""

    def committed(self, step: int, url: str) -> None:
        """A checkpoint counts."""
