"""The driver of a run, from the checks to the last commit.

Everything that can be refused is checked before the MLflow run is made, so that bad input leaves no half run behind.
Then the controller leads; the driver is never in the step's path.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.config import RunConfig, flatten, task_of
from orchestrator.controller import Controller
from orchestrator.group.cluster import RayCluster, connected, job_place
from orchestrator.group.keeper import new_token
from orchestrator.group.pool import Pool
from orchestrator.log.commits import Commits
from orchestrator.log.lease import Lease
from orchestrator.log.retention import Janitor
from orchestrator.log.run_log import FencedError, RunLog
from orchestrator.preflight import (
    Found,
    Inputs,
    await_free_run,
    check_identity,
    check_inputs,
    find_run,
    identity,
    in_background,
    run_store,
)
from orchestrator.record.events import DriverStarted
from orchestrator.record.journal import Journal
from orchestrator.record.progress import Progress
from orchestrator.record.provenance import Provenance, provenance
from orchestrator.record.recorder import RunRecorder, Watcher, go_on_with
from orchestrator.record.report import Links
from orchestrator.stop import StopSignal
from orchestrator.stretch import Stretch
from workers.common.errors import ClusterError, Interrupted, StorageError
from workers.common.storage import configure_s3

if TYPE_CHECKING:
    from orchestrator.record.tracking import RunRecord

T = TypeVar("T")
GRACE_S = 5.0
"""How long to wait for more slots than the minimum, once the minimum is there."""


@dataclass
class RunResult:
    """What a run comes to."""

    run_id: str
    status: str = "failed"
    steps: int = 0
    tokens: int = 0
    world_size: int = 0
    """At the end."""
    val_loss_start: float | None = None
    val_loss: float | None = None
    checkpoint: str = ""
    first_step_time: float | None = None
    """Seconds since the epoch at which the first step of this attempt was finished."""
    sample: str = ""
    recoveries: int = 0
    """Faults that the run has survived."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Each recovery and each announced change of the group: reason, cause, seconds, steps redone."""
    goodput: float | None = None
    """Share of the time since the run's beginning that went into steps that count."""
    mttr_s: float | None = None
    """Mean seconds from a fault to the start of the next new step."""
    losses: tuple[list[tuple[int, float]], list[tuple[int, float]]] = ((), ())  # type: ignore[assignment]
    """Training and validation losses of the whole run, `(step, nats per token)`."""
    page: str = ""
    """Path of the run in MLflow's UI."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What most runs do without."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """Become artifacts of the run at its beginning, by name."""
    artifacts: Callable[[RunResult, Any], None] = lambda result, record: None
    """Called with the result and the MLflow record before the record is closed."""
    take_over: bool = False
    """Take the run from a driver that leads it."""
    stretch: Stretch | None = None
    """What to train once more of another run."""
    kill_after: int | None = None
    """For demonstrations: SIGKILL one worker after this step."""


def run(
    config: RunConfig,
    resume: str,
    address: str | None,
    watcher: Watcher,
    stop: StopSignal,
    options: Options = Options(),
) -> RunResult:
    """Train a run from its start, or from where it is, to its end.

    Args:
        config: of the run, with absolute paths.
        resume: `never`, `auto` (the unfinished run of that name, if there is one) or a run's id or name.
        address: of a Ray cluster; None starts a local one, unless RAY_ADDRESS is set.
        watcher: shows what happens.
        stop: tells when a person wants it to end.
        options: what most runs do without.

    Returns:
        The result; `status` is `finished` or `interrupted`.

    Raises:
        RaymuonError: with the exit code of what went wrong.
    """
    configure_s3(config.storage.s3_endpoint)
    stretch = options.stretch
    corpus = stretch and stretch.corpus
    inputs = _await(in_background(lambda: check_inputs(config, corpus), may_be_torn=True), stop)
    if inputs.warning:
        watcher.warn(inputs.warning)
    found = in_background(lambda: find_run(config, inputs.corpus, resume), may_be_torn=False)
    if resume != "never" and (notice := _await(found, stop).notice):  # Told, or refused, before Ray starts.
        watcher.warn(notice)
    free = in_background(lambda: options.take_over or await_free_run(config, found.result()), may_be_torn=True)

    def check() -> None:
        stop.check()
        for answer in (found, free):
            if answer.done():
                answer.result()  # A refusal does not wait for slots or workers.

    watcher.phase("starting Ray")
    with connected(address, stop) as joined:
        cluster = RayCluster(config.scaling, joined.local)
        with Pool(
            cluster, config.scaling, config.storage, new_token(), config.recovery.hang_s, notice=watcher.warn
        ) as pool:
            pool.rehearsal = task_of(config, inputs.corpus, run_url="", attempt=0, manifest=None)
            _await_slots(pool, cluster, watcher, check)
            watcher.phase(f"starting {min(pool.num_slots, config.scaling.max_workers)} worker(s)")
            deadline = time.monotonic() + config.scaling.wait_s
            while pool.num_starting and time.monotonic() < deadline:
                check()
                pool.refresh()
                time.sleep(0.02)
            _await(free, stop)
            return lead(config, inputs, _await(found, stop), pool, watcher, stop, options)


def _await(future: Future[T], stop: StopSignal) -> T:
    """Wait in short stretches, so that a person can interrupt."""
    while not future.done():
        stop.check()
        wait([future], timeout=0.1)
    return future.result()


def _await_slots(pool: Pool, cluster: RayCluster, watcher: Watcher, check: Callable[[], None]) -> None:
    """Wait for all slots, or for the minimum and a short grace; what is still pending stays as demand.

    Raises:
        ClusterError: the cluster did not give the minimum in time.
    """
    scaling = pool.scaling
    began, grace_ends, noticed = time.monotonic(), None, False
    while True:
        check()
        pool.refresh()
        now, given = time.monotonic(), pool.num_slots
        if given >= scaling.min_workers and grace_ends is None:
            grace_ends = now + GRACE_S
        if given >= scaling.max_workers + scaling.standby or (grace_ends is not None and now >= grace_ends):
            return
        if now >= began + scaling.wait_s and given < scaling.min_workers:
            raise ClusterError(
                f"scaling.min_workers={scaling.min_workers}: after {scaling.wait_s:g} s the cluster has given "
                f"{given} slot(s) of {cluster.bundle}; the nodes that are up have room for {cluster.room()}. Lower "
                "scaling.min_workers, add nodes, or raise scaling.wait_s"
            )
        if not noticed and given < scaling.min_workers and now > began + 2:
            watcher.warn(
                f"waiting for {scaling.min_workers} worker slots of {cluster.bundle}; the cluster has given {given}"
            )
            noticed = True
        time.sleep(0.02)


def lead(
    config: RunConfig,
    inputs: Inputs,
    found: Found,
    pool: Pool,
    watcher: Watcher,
    stop: StopSignal,
    options: Options,
) -> RunResult:
    """Make or take over the run, train with the pool's workers, and close the record whatever happens."""
    from orchestrator.record.tracking import RunRecord

    run_id = stop.run_id = found.run_id or found.tracking.create(config.run.name, flatten(asdict(config)))
    page = found.tracking.page(run_id)
    record = RunRecord(found.tracking, run_id)
    watcher.page(found.tracking.uri, page)
    try:
        with Lease(run_store(config, run_id), strict=bool(inputs.warning)) as lease:
            result = _attempt(config, inputs, found, record, lease, pool, watcher, stop, options)
        result.page = page
        try:
            options.artifacts(result, record)
        except StorageError as error:  # The training is done and saved: a missing picture does not undo it.
            watcher.warn(str(error))
    except FencedError:
        record.abandon()  # The run is another driver's now, and so is its record.
        raise
    except BaseException as error:
        with suppress(StorageError):  # The first error is the one to tell.
            if not isinstance(error, Interrupted):
                record.tag("raymuon.error", (str(error).splitlines() or [type(error).__name__])[0][:500])
            record.close("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    try:
        record.close("FINISHED" if result.status == "finished" else "KILLED")
    except StorageError as error:
        saved = f"the training is {result.status} at step {result.steps} and saved, {result.checkpoint}"
        raise StorageError(f"{saved}; its record in MLflow is not complete, its journal is: {error}") from error
    return result


def _attempt(
    config: RunConfig,
    inputs: Inputs,
    found: Found,
    record: "RunRecord",
    lease: Lease,
    pool: Pool,
    watcher: Watcher,
    stop: StopSignal,
    options: Options,
) -> RunResult:
    """Take the run over, lead it to its end, and say what it came to."""
    log = found.log or RunLog(lease.store)
    log.guard = lease.check
    log.refresh()  # Since the preflight another driver may have come and gone.
    url, run_identity = log.store.url, identity(config, inputs.corpus)
    if log.identity is not None:
        check_identity(log, run_identity)
    manifest, manifest_url = log.newest_good(), ""
    if manifest is None and options.stretch is not None:
        manifest, manifest_url = options.stretch.manifest, options.stretch.run_url
    for text in log.damaged:
        watcher.warn(f"{text}; it does not count")
    attempt = log.take_over(run_identity, inputs.warning)
    code, (job, dashboard) = provenance(), job_place()
    links = Links(url, config.train.steps, code, job, dashboard)
    for key, value in {**links.tags(), "raymuon.store_fences": str(not inputs.warning).lower()}.items():
        record.tag(key, value)
    journal = Journal(log.store, attempt)
    restored = manifest.step if manifest else 0
    tally, events = go_on_with(config, record, journal, restored, time.time(), watcher.warn)
    last_step = options.stretch.last_step if options.stretch else config.train.steps
    recorder = RunRecorder(config, record, journal, watcher, links, last_step, tally, events)
    progress = Progress(
        step=restored,
        tokens=manifest.counters["tokens"] if manifest else 0,
        validated=min(record.marks["validation"], restored) if manifest else -1,
        committed=restored if manifest else -1,
        seen=record.marks["train"],
    )
    if manifest:
        recorder.checkpoint = f"{url}@{restored}"

    commits = Commits(log, attempt, run_identity, manifest, recorder.before_commit)
    with Janitor(log, config.checkpoint, commits.bad, watcher.warn) as janitor:
        commits.after = janitor.wake
        task = task_of(config, inputs.corpus, url, attempt, manifest, found.origin)
        task = replace(task, manifest_url=manifest_url, until=last_step)
        controller = Controller(config, pool, commits, task, progress, recorder, tally, lease, options.kill_after)
        recorder.event(_started(config, inputs, code, attempt, progress.step))
        recorder.keep(options.files)
        try:
            with stop.during_training():
                status = controller.run(stop)
        except FencedError:
            raise  # The record is another driver's from here on.
        except BaseException:
            recorder.close(time.monotonic())
            raise
        recorder.close(time.monotonic())
    record.flush()
    result = RunResult(
        record.run_id,
        status=status,
        steps=controller.ended_at,
        tokens=progress.tokens,
        world_size=progress.world_size,
        val_loss=recorder.val_loss,
        checkpoint=recorder.checkpoint,
        first_step_time=recorder.first_step_time,
        sample=recorder.sample,
        recoveries=len(tally.faults),
        changes=[change for change in tally.recoveries if change["reason"] != "start"],
        goodput=tally.goodput(time.monotonic()),
        mttr_s=tally.mean_time_to_recovery(),
    )
    try:
        result.losses = record.history("loss"), record.history("val_loss")
    except StorageError as error:  # Closing the record will say so; the training is done.
        watcher.warn(str(error))
    if result.losses[1]:
        result.val_loss = result.losses[1][-1][1]
        if result.losses[1][0][0] == 0:
            result.val_loss_start = result.losses[1][0][1]
    return result


def _started(config: RunConfig, inputs: Inputs, code: Provenance, attempt: int, step: int) -> DriverStarted:
    return DriverStarted(
        time=time.time(),
        step=step,
        attempt=attempt,
        config=asdict(config),
        provenance=asdict(code),
        corpus=inputs.corpus.url,
    )
