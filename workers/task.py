"""What a worker is asked to do in one generation: everything it needs, in one message, without torch."""

from dataclasses import dataclass

from optim.config import OptimConfig
from workers.checkpoint.manifest import Manifest
from workers.config import CheckpointConfig, DataConfig, ModelConfig, TrainConfig
from workers.data.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run's config, data and place in storage, and the checkpoint to go on from."""

    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    seed: int
    corpus: Corpus
    run_url: str
    """The run's folder."""
    attempt: int
    """Which take-over of the run this is; 1 is the first."""
    manifest: Manifest | None
    """Where to go on from; None starts anew."""


@dataclass(frozen=True, kw_only=True)
class Membership:
    """This worker's place in a generation of the group."""

    generation: int
    rank: int
    world_size: int
    host: str
    """Where rank 0 holds the rendezvous store."""
    port: int
