"""The driver of a run, from the checks to the last commit.

It forms the group, hands out the task and then only listens: reports go to MLflow and to whoever watches, shards become
commits. It is never in the step's path. Everything that can be refused is checked before the MLflow run is made, so
that bad input leaves no half run behind.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from orchestrator.cluster import connected, reserved_slots, uses_gpu
from orchestrator.commits import Commits
from orchestrator.config import RunConfig, flatten, task_of
from orchestrator.preflight import Found, check_identity, check_inputs, find_run, identity, in_background, run_store
from orchestrator.run_log import FencedError, RunLog
from orchestrator.worker_group import WorkerGroup
from workers.data.corpus import Corpus
from workers.errors import ConfigError, Interrupted, RaymuonError, StorageError, TrainingError
from workers.reports import Ended, Report, Sampled, ShardWritten, StepDone, Validated
from workers.storage import configure_s3

T = TypeVar("T")
BLAME_S = 2.0
"""How long to listen on after a failure: what a rank tells may only be the consequence of another's death."""


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

    def committed(self, step: int, url: str) -> None:
        """A checkpoint counts."""


class StopSignal:
    """What the person at the terminal wants: nothing, a clean stop, or an end at once.

    A signal handler only counts. Raising from it would unwind through Ray's C++ calls, which turn it into an error of
    their own; so whoever waits does so in short stretches and calls `check`.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.training = False

    def request(self) -> None:
        """Count a Ctrl-C or SIGTERM."""
        self.requests += 1

    def check(self) -> None:
        """Raise Interrupted after a second request, or after the first where there is no step to finish."""
        if self.requests >= (2 if self.training else 1):
            raise Interrupted("interrupted; what the last checkpoint holds is kept")

    @contextmanager
    def during_training(self) -> Iterator[None]:
        """Mark the time in which there is a step to finish."""
        self.training = True
        try:
            yield
        finally:
            self.training = False


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
        config: of the run, with absolute paths.
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
    configure_s3(config.storage.s3_endpoint)
    inputs = _await(in_background(lambda: check_inputs(config), may_be_torn=True), stop)
    if not inputs.store_fences:
        watcher.warn(
            f"{config.checkpoint.url} does not honour conditional creates: see to it that one driver alone leads a run"
        )
    found = in_background(lambda: find_run(config, inputs.corpus, resume), may_be_torn=False)

    def check() -> None:
        stop.check()
        if found.done():
            found.result()  # A refusal does not wait for slots or workers.

    watcher.phase("starting Ray")
    with (
        connected(address) as local,
        reserved_slots(config.scaling, local, watcher.warn, check) as slots,
        WorkerGroup(slots, config.scaling, uses_gpu(config.scaling)) as group,
    ):
        watcher.phase(f"starting {group.world_size} worker(s)")
        group.prepare(config.storage)
        while not group.prepared(timeout_s=0.2):
            check()
        return _lead(config, inputs.corpus, _await(found, stop), group, watcher, stop, artifacts)


def _await(future: Future[T], stop: StopSignal) -> T:
    """Wait in short stretches, so that a person can interrupt."""
    while not future.done():
        stop.check()
        wait([future], timeout=0.1)
    return future.result()


def _lead(
    config: RunConfig,
    corpus: Corpus,
    found: Found,
    group: WorkerGroup,
    watcher: Watcher,
    stop: StopSignal,
    artifacts: Callable[[RunResult, Any], None],
) -> RunResult:
    """Make or take over the run, train, and close the record whatever happens."""
    from orchestrator.tracking import RunRecord

    run_id = found.run_id or found.tracking.create(config.run.name, flatten(asdict(config)))
    record = RunRecord(found.tracking, run_id)
    try:
        # The log is read anew: since the preflight another driver may have come and gone.
        log = RunLog(run_store(config, run_id))
        if log.identity is not None:
            check_identity(log, identity(config, corpus))
        attempt = _Attempt(config, corpus, group, log, record, watcher)
        result = attempt.run(stop)
        record.flush()
        result.losses = (record.history("loss"), record.history("val_loss"))
        if result.losses[1] and result.losses[1][0][0] == 0:
            result.val_loss_start = result.losses[1][0][1]
        try:
            artifacts(result, record)
        except StorageError as error:  # The training is done and saved: a missing picture does not undo it.
            watcher.warn(str(error))
    except FencedError:
        record.abandon()  # The run is another driver's now, and so is its record.
        raise
    except BaseException as error:
        with suppress(StorageError):  # The first error is the one to tell.
            record.close("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    record.close("FINISHED" if result.status == "finished" else "KILLED")
    return result


class _Attempt:
    """One attempt at a run, from the take-over to the end of every worker."""

    def __init__(
        self, config: RunConfig, corpus: Corpus, group: WorkerGroup, log: RunLog, record: Any, watcher: Watcher
    ) -> None:
        self.config, self.group, self.log, self.record, self.watcher = config, group, log, record, watcher
        run_identity = identity(config, corpus)
        number, manifest = log.take_over(run_identity), log.manifest()
        self.task = task_of(config, corpus, log.store.url, number, manifest)
        # What a checkpoint stands for is in the record before it counts, as long as MLflow answers.
        self.commits = Commits(log, number, run_identity, group.world_size, before=record.flush)
        self.ended: list[Ended] = []
        self.failed_at: float | None = None
        self.result = RunResult(log.store.url.rsplit("/", 1)[-1], world_size=group.world_size)
        if manifest:
            self.result.steps, self.result.tokens = manifest.step, manifest.counters["tokens"]
            self.result.checkpoint = f"{log.store.url}@{manifest.step}"
        record.tag("raymuon.checkpoint_url", log.store.url)

    def run(self, stop: StopSignal) -> RunResult:
        """Train, and take in reports until every worker has ended."""
        self.group.start(self.task)
        self.watcher.begin(self.result.run_id, self.result.steps, self.config.train.steps, self.group.world_size)
        with stop.during_training():
            pausing, warned = False, None
            while len(self.ended) < self.group.world_size:
                stop.check()
                if stop.requests and not pausing:
                    pausing = True
                    self.watcher.warn("stopping after this step, with a checkpoint; once more ends at once")
                    self.group.pause()
                for report in self.group.reports(timeout_s=0.2):
                    self._take(report)
                self._blame()
                if self.record.failure not in (None, warned):
                    self.watcher.warn(f"MLflow takes no metrics ({self.record.failure}); they wait, training goes on")
                warned = self.record.failure
        self.result.status = "finished" if self.ended[0].outcome == "finished" else "interrupted"
        return self.result

    def _take(self, report: Report) -> None:
        self.watcher.report(report)
        match report:
            case StepDone():
                self.result.steps, self.result.tokens = report.step, report.tokens
                self.result.first_step_time = self.result.first_step_time or report.time
                metrics = _train_metrics(report, self.config, self.group.world_size)
                self.record.log("train", report.step, report.time, metrics)
            case Validated():
                self.result.val_loss = report.loss
                self.record.log("validation", report.step, report.time, {"val_loss": report.loss})
            case ShardWritten():
                if self.commits.take(report):
                    self.result.checkpoint = f"{self.log.store.url}@{report.step}"
                    self.watcher.committed(report.step, self.result.checkpoint)
            case Sampled():
                self.result.sample = report.text
            case Ended():
                self.ended.append(report)
                if report.outcome == "failed" and self.failed_at is None:
                    self.failed_at = time.monotonic()

    def _blame(self) -> None:
        """Raise what made the group fail, once every rank has told or has had the time to."""
        if self.failed_at is None:
            return
        if len(self.ended) == self.group.world_size or time.monotonic() > self.failed_at + BLAME_S:
            failed = [report for report in self.ended if report.outcome == "failed"]
            # A peer that went away is a consequence; what storage or the config refused is a cause.
            raise _error(min(failed, key=lambda r: (r.exit_code == TrainingError.exit_code, r.time)))


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
