"""The driver of a run, from the checks to the last commit.

It forms the group, hands out the task and then only listens: reports go to MLflow and to whoever watches, shards become
commits. It is never in the step's path. Everything that can be refused is checked before the MLflow run is made, so
that bad input leaves no half run behind.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from orchestrator.cluster import connected, reserved_slots, uses_gpu
from orchestrator.config import RunConfig, absolute
from orchestrator.run_log import RunLog
from orchestrator.worker_group import WorkerGroup
from workers.checkpoint.manifest import Manifest
from workers.data.corpus import Corpus, check_corpus, prepare
from workers.errors import ConfigError, Interrupted, RaymuonError, StorageError, TrainingError
from workers.reports import Ended, Report, Sampled, ShardWritten, StepDone, Validated
from workers.storage import Store, configure_s3
from workers.task import Task


class Watcher(Protocol):
    """Whoever shows a run to a person; called from the driver's loop, so it must be quick."""

    def phase(self, text: str) -> None:
        """A part of the start has begun."""

    def warn(self, text: str) -> None:
        """Something is wrong that does not end the run."""

    def begin(self, run_id: str, first_step: int, last_step: int, world_size: int) -> None:
        """Training begins after `first_step`."""

    def report(self, report: Report) -> None:
        """A worker told something."""


class StopSignal:
    """What the person at the terminal wants: nothing, a clean stop, or an end at once.

    `request` is called from a signal handler in the main thread. Before training there is no step to finish, so the
    first request ends the start itself.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.training = False

    def request(self) -> None:
        """Take note of a first request; raise Interrupted for a second, or where there is nothing to finish."""
        if self.requested.is_set() or not self.training:
            raise Interrupted("interrupted; what the last checkpoint holds is kept")
        self.requested.set()


@dataclass
class RunResult:
    """What a run comes to."""

    run_id: str
    status: str = "failed"
    steps: int = 0
    tokens: int = 0
    world_size: int = 0
    val_loss_start: float | None = None
    val_loss: float | None = None
    checkpoint: str = ""
    first_step_time: float | None = None
    """Seconds since the epoch at which the first step of this attempt was finished."""
    sample: str = ""
    losses: tuple[list[tuple[int, float]], list[tuple[int, float]]] = ((), ())  # type: ignore[assignment]
    """Training and validation losses of the whole run, `(step, nats per token)`."""


@dataclass(frozen=True)
class _Preflight:
    """What was found before the run was made."""

    tracking: Any
    corpus: Corpus
    run_id: str | None
    manifest: Manifest | None


def run(
    config: RunConfig,
    resume: str,
    address: str | None,
    watcher: Watcher,
    stop: StopSignal,
    artifacts: Callable[[RunResult, Any], None] = lambda result, record: None,
) -> RunResult:
    """Train a run from its start, or from where it is, to its end.

    Args:
        config: of the run.
        resume: `never`, `auto` (the unfinished run of that name, if there is one) or a run's id or name.
        address: of a Ray cluster; None starts a local one, unless RAY_ADDRESS is set.
        watcher: shows what happens.
        stop: tells when a person wants it to end.
        artifacts: called with the result and the MLflow record before the record is closed.

    Returns:
        The result; `status` is `finished` or `interrupted`.

    Raises:
        RaymuonError: with the exit code of what went wrong.
    """
    config = absolute(config)
    configure_s3(config.storage.s3_endpoint)
    # The checks and MLflow's slow import run beside Ray's start and the workers' own imports.
    with ThreadPoolExecutor(1, thread_name_prefix="preflight") as pool:
        preflight = pool.submit(_preflight, config, resume)
        watcher.phase("starting Ray")
        with connected(address) as local, reserved_slots(config.scaling, local, watcher.warn) as slots:
            group = WorkerGroup(slots, config.scaling, uses_gpu(config.scaling))
            try:
                watcher.phase(f"starting {group.world_size} worker(s)")
                addresses = group.prepare(config.storage)
                found = preflight.result()
                return _lead(config, found, group, addresses, watcher, stop, artifacts)
            finally:
                group.kill()


def _preflight(config: RunConfig, resume: str) -> _Preflight:
    """Check storage, data and tracking, and find the run to go on with; change nothing but caches."""
    Store(config.checkpoint.url).probe()
    corpus = prepare(config.data)
    if problems := check_corpus(corpus, config.train.seq_len, config.train.global_batch):
        raise ConfigError("\n".join(problems))

    from orchestrator.tracking import Tracking  # MLflow takes seconds to import.

    tracking = Tracking(config.tracking)
    run_id = None
    if resume == "auto":
        run_id = tracking.unfinished(config.run.name)
    elif resume != "never":
        run_id = tracking.find(resume)
    manifest = None
    if run_id is not None:
        manifest = RunLog(_run_store(config, run_id)).manifest()
        if manifest is not None:
            _check_identity(identity(config, corpus), manifest)
    return _Preflight(tracking, corpus, run_id, manifest)


def _lead(
    config: RunConfig,
    found: _Preflight,
    group: WorkerGroup,
    addresses: list[Any],
    watcher: Watcher,
    stop: StopSignal,
    artifacts: Callable[[RunResult, Any], None],
) -> RunResult:
    """Make or take over the run, train, and close the record whatever happens."""
    from orchestrator.tracking import RunRecord

    run_id = found.run_id or found.tracking.create(config.run.name, flat_params(config))
    log = RunLog(_run_store(config, run_id))
    attempt = log.take_over()
    record = RunRecord(found.tracking, run_id)
    result = RunResult(run_id, world_size=group.world_size)
    try:
        task = Task(
            model=config.model,
            optim=config.optim,
            data=config.data,
            train=config.train,
            checkpoint=config.checkpoint,
            storage=config.storage,
            seed=config.seed,
            corpus=found.corpus,
            run_url=log.store.url,
            attempt=attempt,
            manifest=found.manifest,
        )
        if found.manifest:
            result.steps, result.tokens = found.manifest.step, found.manifest.counters["tokens"]
            result.checkpoint = f"{log.store.url}@{found.manifest.step}"
        group.start(task, addresses)
        watcher.begin(run_id, result.steps, config.train.steps, group.world_size)
        with _training(stop):
            _follow(config, task, group, log, record, result, watcher, stop)
        record.flush()
        result.losses = (record.history("loss"), record.history("val_loss"))
        if result.losses[1] and result.losses[1][0][0] == 0:
            result.val_loss_start = result.losses[1][0][1]
        artifacts(result, record)
    except BaseException as error:
        with suppress(StorageError):  # The first error is the one to tell.
            record.close("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    record.close("FINISHED" if result.status == "finished" else "KILLED")
    return result


def _follow(
    config: RunConfig,
    task: Task,
    group: WorkerGroup,
    log: RunLog,
    record: Any,
    result: RunResult,
    watcher: Watcher,
    stop: StopSignal,
) -> None:
    """Take in reports until every worker has ended."""
    commits = _Commits(task, identity(config, task.corpus), group.world_size, log)
    ended: list[Ended] = []
    pausing, failing = False, record.failure
    while len(ended) < group.world_size:
        if stop.requested.is_set() and not pausing:
            pausing = True
            watcher.warn("stopping after this step, with a checkpoint; once more ends at once")
            group.pause()
        for report in group.reports(timeout_s=0.5):
            watcher.report(report)
            match report:
                case StepDone():
                    result.steps, result.tokens = report.step, report.tokens
                    result.first_step_time = result.first_step_time or report.time
                    record.log("train", report.step, report.time, _train_metrics(report, config, group.world_size))
                case Validated():
                    result.val_loss = report.loss
                    record.log("validation", report.step, report.time, {"val_loss": report.loss})
                case ShardWritten():
                    if manifest := commits.take(report):
                        record.flush()  # What a checkpoint stands for is in the record before it counts.
                        log.commit(manifest)
                        result.checkpoint = f"{log.store.url}@{manifest.step}"
                case Sampled():
                    result.sample = report.text
                case Ended(outcome="failed"):
                    raise _error(report)
                case Ended():
                    ended.append(report)
        if record.failure and record.failure != failing:
            watcher.warn(f"MLflow does not take metrics ({record.failure}); training goes on, the rows wait")
        failing = record.failure
    result.status = "finished" if ended[0].outcome == "finished" else "interrupted"


class _Commits:
    """Collects the shards of each step until every rank's is there."""

    def __init__(self, task: Task, run_identity: dict[str, Any], world_size: int, log: RunLog) -> None:
        self.task, self.identity, self.world_size, self.log = task, run_identity, world_size, log
        self.waiting: dict[int, dict[int, ShardWritten]] = {}

    def take(self, report: ShardWritten) -> Manifest | None:
        """Return the checkpoint's manifest when this shard was its last."""
        shards = self.waiting.setdefault(report.step, {})
        shards[report.rank] = report
        if len(shards) < self.world_size:
            return None
        del self.waiting[report.step]
        return Manifest(
            run_id=self.log.store.url.rsplit("/", 1)[-1],
            attempt=self.task.attempt,
            step=report.step,
            world_size=self.world_size,
            identity=self.identity,
            counters=report.counters,
            shapes=report.shapes,
            shards=tuple(shards[rank].shard for rank in sorted(shards)),
        )


def identity(config: RunConfig, corpus: Corpus) -> dict[str, Any]:
    """Return what has to be the same for a run to go on: otherwise it would be another run, silently."""
    return {
        "model": asdict(config.model),
        "optim.name": config.optim.name,
        "data": corpus.content_hash,
        "train.seq_len": config.train.seq_len,
        "train.global_batch": config.train.global_batch,
        "seed": config.seed,
    }


def flat_params(config: RunConfig) -> dict[str, Any]:
    """Return the config as MLflow params: dotted keys."""
    flat: dict[str, Any] = {}
    for section, value in asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{section}.{key}": item for key, item in value.items()})
        else:
            flat[section] = value
    return flat


@contextmanager
def _training(stop: StopSignal) -> Iterator[None]:
    stop.training = True
    try:
        yield
    finally:
        stop.training = False


def _check_identity(wanted: dict[str, Any], manifest: Manifest) -> None:
    """Refuse a checkpoint of another model, other data or another batch; name every difference."""
    differences = []
    for key, value in wanted.items():
        saved = manifest.identity.get(key)
        if isinstance(value, dict) and isinstance(saved, dict):
            differences += [
                f"{key}.{part}: the checkpoint has {saved.get(part)!r}, the config {value[part]!r}"
                for part in value
                if saved.get(part) != value[part]
            ]
        elif saved != value:
            differences.append(f"{key}: the checkpoint has {saved!r}, the config {value!r}")
    if differences:
        raise ConfigError(
            f"run {manifest.run_id} cannot go on from step {manifest.step} with this config:\n"
            + "\n".join(f"  {difference}" for difference in differences)
            + "\nmake them equal, or start a new run with --resume never"
        )


def _train_metrics(report: StepDone, config: RunConfig, world_size: int) -> dict[str, float]:
    return {
        "loss": report.loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "tokens": report.tokens,
        "tokens_per_second": config.train.global_batch * config.train.seq_len / report.seconds,
        "world_size": world_size,
        "expert_imbalance": report.expert_imbalance,
    }


def _error(report: Ended) -> RaymuonError:
    kinds: dict[int, type[RaymuonError]] = {kind.exit_code: kind for kind in (ConfigError, StorageError)}
    return kinds.get(report.exit_code, TrainingError)(f"rank {report.rank}: {report.error}")


def _run_store(config: RunConfig, run_id: str) -> Store:
    return Store(config.checkpoint.url).child(run_id)
