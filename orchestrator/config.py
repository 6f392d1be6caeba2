"""RunConfig: everything that a run is told, composed out of each room's settings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from optim.checks import Check, filled, no_password, require, within
from optim.config import MOST_DECAY, OptimConfig
from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError
from workers.common.storage import absolute_url, local_path, shared_url
from workers.config import CheckpointConfig, ModelConfig, MoonlightConfig, StorageConfig, TelemetryConfig
from workers.data.config import DataConfig, shares_of
from workers.data.corpus import Corpus
from workers.data.tokenizer import BYTE
from workers.recipe import Recipe, TrainConfig, recipe_of
from workers.task import Origin, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What people call the run."""

    name: str = "raymuon"
    """Name in MLflow, and what `--resume auto` looks for."""

    def __post_init__(self) -> None:
        require(
            self,
            *filled(self, name="the run"),
            ('"' not in self.name, f"name must not have a double quote in it, as {self.name} does"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig:
    """How many workers, and what each of them gets."""

    min_workers: int = 1
    """Training does not start with fewer."""
    max_workers: int = 1
    """Training never uses more."""
    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    """What a worker reserves: `gpu` one GPU, `cpu` only processors; `auto` a GPU where the cluster has any."""
    cpus_per_worker: float = 1.0
    """Processors that a worker reserves."""
    standby: int = 0
    """Workers beyond max_workers that are kept ready, to take a dead worker's place at once."""
    wait_s: float = 300.0
    """How long to wait for min_workers on a cluster that we joined; a local Ray has what it has."""
    settle_s: float = 5.0
    """How long to wait for more newcomers before those that are ready are taken in."""

    def __post_init__(self) -> None:
        require(
            self,
            *within(self, "[1, inf)", "min_workers"),
            (
                self.max_workers >= self.min_workers,
                f"max_workers must be at least min_workers ({self.min_workers}), not {self.max_workers}",
            ),
            *within(self, "(0, inf)", "cpus_per_worker", "wait_s"),
            *within(self, "[0, inf)", "standby", "settle_s"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryConfig:
    """How many faults a run bears, and how fast a worker that hangs is found."""

    max_failures: int = 30
    """Within an hour: workers and nodes that died or hung without notice. -1: any number."""
    max_preemptions: int = -1
    """Within an hour: nodes that were taken away with notice. -1: any number."""
    max_storage_failures: int = 5
    """Within an hour: times that a checkpoint or the data could not be read. -1: any number."""
    max_failed_saves: int = 3
    """Checkpoints in a row that could not be written; one more ends the run."""
    poison_after: int = 3
    """A step that has ended the group this often ends the run; so does the same failure before any step. One of memory
    ends it when it comes a second time."""
    max_in_a_row: int = 10
    """Failures without a new step in between; one more ends the run."""
    free_retries: int = 3
    """Faults without a new step in between that are recovered from at once; after them comes a back-off."""
    backoff_s: float = 1.0
    """The first back-off; it doubles each time."""
    max_backoff_s: float = 60.0
    """The longest back-off."""
    hang_s: float = 8.0
    """A worker that gives no sign of life for this long, or a group that gets on no further, is taken for hung."""

    def __post_init__(self) -> None:
        require(
            self,
            *within(self, "[-1, inf)", "max_failures", "max_preemptions", "max_storage_failures", lowest="any number"),
            *within(self, "[1, inf)", "poison_after", "max_in_a_row"),
            *within(self, "[0, inf)", "max_failed_saves", "free_retries", "backoff_s"),
            (
                self.max_backoff_s >= self.backoff_s,
                f"max_backoff_s must be at least backoff_s ({self.backoff_s}), not {self.max_backoff_s}",
            ),
            *within(self, "(0, inf)", "hang_s"),
        )

    def budget(self, kind: str) -> int | None:
        """Return how many faults of a kind are borne within an hour; None for any number."""
        limit = {
            "failure": self.max_failures,
            "preemption": self.max_preemptions,
            "storage": self.max_storage_failures,
        }[kind]
        return None if limit < 0 else limit


SQLITE = "sqlite:///"
DEFAULT_TRACKING_URI = f"{SQLITE}runs/mlflow.db"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where MLflow keeps the record."""

    uri: str = DEFAULT_TRACKING_URI
    """MLflow tracking URI; a password belongs into MLFLOW_TRACKING_PASSWORD, not here."""
    experiment: str = "raymuon"
    """MLflow experiment."""

    def __post_init__(self) -> None:
        require(
            self,
            *filled(self, uri="a tracking URI", experiment="an experiment"),
            *no_password(self, "uri"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The whole config of a run."""

    run: RunInfo = field(default_factory=RunInfo)
    """The run's name."""
    model: ModelConfig = field(default_factory=MoonlightConfig)
    """Architecture and sizes."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, batches, validation."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """What is measured of the training."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """Workers."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Faults."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """How storage is reached."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    seed: int = 0
    """Of the initial weights, the data order and everything random."""

    def __post_init__(self) -> None:
        require(
            self,
            (0 <= self.seed < 2**63, f"seed must be 0 or more, and less than 2**63, not {self.seed}"),
            *self._weight_checks(),
            *(
                (step <= self.train.steps, f"checkpoint.at: step {step} is behind the last one, {self.train.steps}")
                for step in self.checkpoint.at
            ),
        )
        require(self, *self._decay_checks())

    @property
    def recipe(self) -> Recipe:
        """What each step trains with."""
        return recipe_of(self.train, self.optim)

    def _decay_checks(self) -> Iterator[Check]:
        for stage in self.recipe.stages:
            decay, rate = self.optim.weight_decay, stage.curve.peak
            most = f"a tenth of the weights in a step of stage {stage.name}, at a learning rate of {rate:g}"
            text = f"optim.weight_decay={decay:g} takes more than {most}; lower one of them"
            yield decay * rate <= MOST_DECAY * (1 + 1e-9), text

    def _weight_checks(self) -> Iterator[Check]:
        names = [source.name for source in self.data.sources]
        known = f"the sources are {', '.join(names)}" if names else "there are no data.sources"
        for number, stage in enumerate(self.train.stages):
            where, unknown = f"train.stages[{number}].weights", sorted(stage.weights.keys() - set(names))
            yield not unknown, f"{where}: no source is called {', '.join(unknown)}; {known}"
            once = not (stage.weights and self.data.mixture)
            yield once, f"{where} and data.mixture both say which weights hold; leave out one of them"
            try:
                shares_of([stage.weights.get(name, 0.0) for name in names if not unknown and stage.weights] or [1.0])
            except ValueError as error:
                yield False, f"{where}: {error}"


def absolute(config: RunConfig) -> RunConfig:
    """Make all local paths absolute, for workers have working directories of their own, and give URLs their one form.

    Raises:
        ConfigError: a URL cannot be a place for files, or for a database.
    """
    data, uri = config.data, config.tracking.uri
    if (file := database(uri)) is not None:
        if {"?", "%"} & {*str(file)}:  # Of a URL; MLflow and its driver do not agree on how to write them in one.
            raise ConfigError(
                f"tracking.uri={uri}: {file} has a ? or a % in its name, with which MLflow opens another file; name "
                "another place, or a server"
            )
        uri = "".join((SQLITE, str(file), *uri.partition("?")[1:]))
    return replace(
        config,
        data=replace(
            data,
            tokenizer=_tokenizer(data.tokenizer),
            prepared_url=_place("data.prepared_url", data.prepared_url),
            ledger=data.ledger and _place("data.ledger", data.ledger),
        ),
        train=replace(config.train, init=config.train.init and _place("train.init", config.train.init)),
        checkpoint=replace(config.checkpoint, url=_place("checkpoint.url", config.checkpoint.url)),
        tracking=replace(config.tracking, uri=uri),
    )


def _tokenizer(url: str) -> str:
    return url if url == BYTE or "::" in url else _place("data.tokenizer", url, absolute_url)


def _place(key: str, url: str, form: Callable[[str], str] = shared_url) -> str:
    try:
        return form(url)
    except ConfigError as error:
        raise ConfigError(f"{key}={error}") from error


def database(uri: str) -> Path | None:
    """Return the file of a tracking database, %20 in its URL being a blank; None for a server."""
    if not uri.startswith(SQLITE):
        return None
    return local_path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))


def database_files(uri: str) -> tuple[str, ...]:
    """Return the files that a tracking database may have; none for a server."""
    if (file := database(uri)) is None:
        return ()
    return str(file), *(f"{file}-{part}" for part in ("journal", "wal", "shm"))


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested dicts under dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update({f"{key}.{part}": leaf for part, leaf in flatten(value).items()})
        else:
            leaves[key] = value
    return leaves


def task_of(
    config: RunConfig,
    corpora: tuple[Corpus, ...],
    run_url: str,
    attempt: int,
    manifest: Manifest | None,
    origin: Origin | None = None,
) -> Task:
    """Return what the workers are told of a run: no more than they need, so nothing of Ray or MLflow."""
    return Task(
        model=config.model,
        optim=config.optim,
        data=config.data,
        train=config.train,
        checkpoint=config.checkpoint,
        telemetry=config.telemetry,
        seed=config.seed,
        corpora=corpora,
        run_url=run_url,
        attempt=attempt,
        manifest=manifest,
        origin=origin,
        s3_endpoint=config.storage.s3_endpoint,
    )
