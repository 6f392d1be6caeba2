"""A stretch of another run, trained once more: what a replay hands to the driver."""

from dataclasses import dataclass

from workers.checkpoint.manifest import Manifest
from workers.data.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps of a run, from one of its checkpoints on."""

    run_url: str
    """The run's folder."""
    manifest: Manifest | None
    """The checkpoint to begin with, with its optimizer's state; None: from the run's start."""
    corpora: tuple[Corpus, ...]
    """The run's data."""
    last_step: int
    """After which the stretch ends."""
