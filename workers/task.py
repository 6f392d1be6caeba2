"""What a worker is asked to do in one generation: everything it needs, in one message, without torch."""

from dataclasses import dataclass, field
from functools import cached_property

from optim.config import OptimConfig
from workers.checkpoint.manifest import Manifest
from workers.common.storage import Store
from workers.common.wire import Address
from workers.config import CheckpointConfig, ModelConfig, TelemetryConfig
from workers.data.config import DataConfig
from workers.data.corpus import Corpus
from workers.recipe import Recipe, TrainConfig, recipe_of
from workers.snapshots.kept import Snapshot


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint with whose weights a new run begins."""

    run_url: str
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Task:
    """A run's config, data and place in storage, and the checkpoint to go on from."""

    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    seed: int
    corpora: tuple[Corpus, ...]
    """Of each source, in the order of the config."""
    run_url: str
    """The run's folder."""
    attempt: int
    """Which take-over of the run this is; 1 is the first."""
    manifest: Manifest | None
    """The newest checkpoint: where to go on from if no snapshot is at hand; None starts anew."""
    manifest_url: str = ""
    """The folder of the run whose checkpoint that is, where it is another: a replay begins with the replayed run's, a
    branch with its parent's."""
    until: int = 0
    """Step after which a replay, or a run that is cut short, ends, with a checkpoint; 0: the last one."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    origin: Origin | None = None
    """Where the weights of a run that starts anew come from; None draws them."""
    s3_endpoint: str = ""
    """Of the S3 store that these folders are in, where that is not AWS."""

    def store(self, url: str) -> Store:
        """Return one of the folders that are named here."""
        return Store(url, self.s3_endpoint)

    @cached_property
    def recipe(self) -> Recipe:
        """What each step trains with."""
        return recipe_of(self.train, self.optim)

    @property
    def last_step(self) -> int:
        """The step after which training ends; the schedule's last one is `train.steps`."""
        return self.until or self.train.steps

    def validates(self, step: int) -> bool:
        """Tell whether a validation belongs to a step; one does to the last, wherever that is."""
        return self.train.validates(step) or step == self.last_step

    def saves(self, step: int) -> bool:
        """Tell whether a checkpoint belongs to a step."""
        return self.always_saves(step) or bool((every := self.checkpoint.every) and step % every == 0)

    def always_saves(self, step: int) -> bool:
        """Tell whether one does that is never left out: at the end of the run or a stage, and where it is asked for."""
        return step in (self.last_step, *self.train.ends, *self.checkpoint.at)


@dataclass(frozen=True, kw_only=True)
class KeeperLinks:
    """This node's keeper, and the one of another node that gets the copy; None where there is none."""

    keeper: Address | None = None
    buddy: Address | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """This worker's place in a generation of the group, and what the group goes on from."""

    generation: int
    rank: int
    world_size: int
    host: str
    """Where rank 0 holds the rendezvous store."""
    port: int
    keepers: bool = True
    """Whether the group has keepers at all; without any, nothing is saved."""
    links: KeeperLinks = KeeperLinks()
    snapshot: Snapshot | None = None
    """Where to go on from; None: the task's checkpoint, or the start."""
    validated: int = -1
    """The last step whose validation is on record."""
    committed: int = -1
    """The step of the newest checkpoint."""
    tell_plan: bool = False
    """Have rank 0 tell how the matrices are shared out."""
