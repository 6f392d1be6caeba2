"""The driver of a run, from the checks to the last commit.

Everything that can be refused is checked before the MLflow run is made, so that bad input leaves no half run behind.
Then the controller leads; the driver is never in the step's path. A joined cluster bears any number of runs at the
same time, each in a thread of its own, with processes, a signal to stop and a record of its own.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from orchestrator.attempt import Attempt
from orchestrator.config import RunConfig, flatten, task_of
from orchestrator.generation import Decide, plainly
from orchestrator.group.cluster import connected, job_place
from orchestrator.group.handles import Joined
from orchestrator.group.keeper import new_token
from orchestrator.group.pool import Pool
from orchestrator.living import BranchPoint, Living
from orchestrator.log.lease import Lease
from orchestrator.log.run_log import FencedError
from orchestrator.preflight import Preflight, run_store
from orchestrator.record.events import DriverStarted
from orchestrator.record.journal import Journal
from orchestrator.record.provenance import provenance
from orchestrator.record.recorder import RunRecorder, go_on_with
from orchestrator.record.report import Links
from orchestrator.record.result import RunResult
from orchestrator.record.start import Start
from orchestrator.record.watcher import Watcher
from orchestrator.stop import StopSignal
from orchestrator.stretch import Stretch
from workers.common.errors import ClusterError, Interrupted, StorageError
from workers.data.corpus import Corpus
from workers.task import Task

NOTICE_S = 2.0
"""How long to wait for the first slots in silence."""
GRACE_S = 5.0
"""How long to wait for more slots than the minimum, once the minimum is there."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What most runs do without."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """Become artifacts of the run at its beginning, by name."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of the run, set at its beginning."""
    artifacts: Callable[[RunResult, Any], None] = lambda result, record: None
    """Called with the result and the MLflow record before the record is closed."""
    take_over: bool = False
    """Take the run from a driver that leads it."""
    corpora: tuple[Corpus, ...] | None = None
    """The prepared sources; None prepares them here."""
    stretch: Stretch | None = None
    """What to train once more of another run."""
    until: int = 0
    """The step after which the run ends, validated and with a checkpoint, though its schedule goes on; 0: the last."""
    living: Living | None = None
    """Where branches begin while it trains."""
    branch: BranchPoint | None = None
    """Where it begins itself, as a branch of a living run: in the place of train.init."""
    kill_after: int | None = None
    """For demonstrations: SIGKILL one worker after this step."""
    decide: Decide = plainly
    """Decides what is automatic in `train`, for each number of workers."""
    looked: Future[None] | None = None
    """Whether the run fits, which is found out beside Ray's start; raises where it does not."""
    meanwhile: Callable[[], object] = lambda: None
    """Called while the workers start, which takes seconds."""


def run(
    config: RunConfig,
    resume: str,
    address: str | None,
    watcher: Watcher,
    stop: StopSignal,
    options: Options = Options(),
) -> RunResult:
    """Train a run from its start, or from where it is, to its end, on a cluster that is joined for it.

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
    start = Start.of_process()
    start.end("command")
    preflight = _preflight(config, resume, watcher, stop, options)
    start.end("checks")
    watcher.phase("starting Ray")
    with connected(address, stop) as joined:
        start.end("ray")
        return _run(joined, preflight, watcher, options, start)


def run_on(
    joined: Joined,
    config: RunConfig,
    resume: str,
    watcher: Watcher,
    stop: StopSignal,
    options: Options = Options(),
) -> RunResult:
    """Do the same on a cluster that is joined already, perhaps beside other runs in other threads."""
    start = Start()
    try:
        preflight = _preflight(config, resume, watcher, stop, options)
        start.end("checks")
        return _run(joined, preflight, watcher, options, start)
    finally:
        if options.branch:
            options.branch.done()


def _preflight(config: RunConfig, resume: str, watcher: Watcher, stop: StopSignal, options: Options) -> Preflight:
    corpora = options.stretch.corpora if options.stretch else options.corpora
    known = options.branch.origin if options.branch else None
    if options.branch:
        config = replace(config, train=replace(config.train, init=options.branch.init, init_state="run"))
    if options.living:
        options.living.check(config)
    return Preflight(config, resume, stop, watcher.warn, corpora, options.take_over, known, options.looked)


def _run(joined: Joined, preflight: Preflight, watcher: Watcher, options: Options, start: Start) -> RunResult:
    """Start the workers while the last checks are made, and lead."""
    config = preflight.config
    cluster = joined.slots(config.scaling)
    hang_s = config.recovery.hang_s
    with Pool(cluster, config.scaling, config.storage, new_token(), hang_s, notice=watcher.warn) as pool:
        rehearsal = task_of(config, preflight.inputs.corpora, run_url="", attempt=0, manifest=None)
        pool.rehearsal = replace(rehearsal, train=rehearsal.train.plain())
        _await_slots(pool, watcher, preflight.check)
        start.end("slots")
        watcher.phase(f"starting {min(pool.num_slots, config.scaling.max_workers)} worker(s)")
        options.meanwhile()
        pool.wait(lambda: not pool.num_starting, preflight.check, config.scaling.wait_s)
        start.end("processes", time.time() - pool.imports_s)
        start.end("imports")
        preflight.finish()
        return _lead(preflight, pool, watcher, options, start)


def _await_slots(pool: Pool, watcher: Watcher, check: Callable[[], object]) -> None:
    """Wait for all slots, or for the minimum and a short grace; what is still pending stays as demand.

    Raises:
        ClusterError: the cluster did not give the minimum in time.
    """
    scaling, cluster = pool.scaling, pool.cluster

    def enough() -> bool:
        return pool.num_slots >= scaling.min_workers

    quiet_s = min(NOTICE_S, scaling.wait_s)
    if not pool.wait(enough, check, quiet_s):
        text = f"{scaling.min_workers} worker slots of {cluster.bundle}; the cluster has given {pool.num_slots}"
        watcher.warn(f"waiting for {text}")
        if not pool.wait(enough, check, scaling.wait_s - quiet_s):
            raise ClusterError(
                f"scaling.min_workers={scaling.min_workers}: after {scaling.wait_s:g} s the cluster has given "
                f"{pool.num_slots} slot(s) of {cluster.bundle}; the nodes that are up have room for {cluster.room()}. "
                "Lower scaling.min_workers, add nodes, or raise scaling.wait_s"
            )
    pool.wait(lambda: pool.num_slots >= scaling.max_workers + scaling.standby, check, GRACE_S)


def _lead(preflight: Preflight, pool: Pool, watcher: Watcher, options: Options, start: Start) -> RunResult:
    """Make or take over the run, train with the pool's workers, and close the record whatever happens."""
    from orchestrator.record.tracking import RunRecord

    config, inputs, found, stop = preflight.config, preflight.inputs, preflight.found, preflight.stop
    run_id = stop.run_id = found.run_id or found.tracking.create(config.run.name, flatten(asdict(config)))
    page = found.tracking.page(run_id)
    record = RunRecord(found.tracking, run_id)
    watcher.page(found.tracking.uri, page)

    def begin(journal: Journal, task: Task) -> RunRecorder:
        code, (job, dashboard) = provenance(), job_place()
        links = Links(task.run_url, task.last_step, code, job, dashboard)
        fences = {"raymuon.store_fences": str(not inputs.warning).lower()}
        for key, value in {**options.tags, **links.tags(), **fences}.items():
            record.tag(key, value)
        restored, now = task.manifest.step if task.manifest else 0, time.time()
        tally, events = go_on_with(config, record, journal, restored, now, watcher.warn)
        recorder = RunRecorder(config, record, journal, watcher, links, task.last_step, tally, events, start)
        if task.manifest:
            recorder.checkpoint = f"{task.manifest_url or task.run_url}@{restored}"
        recorder.event(
            DriverStarted(
                time=now,
                step=restored,
                attempt=task.attempt,
                config=asdict(config),
                provenance=asdict(code),
                corpora={corpus.name: corpus.url for corpus in inputs.corpora},
            )
        )
        recorder.keep(options.files)
        return recorder

    try:
        with Lease(run_store(config, run_id), strict=bool(inputs.warning)) as lease:
            known = found.log, found.origin, options.stretch, options.until
            attempt = Attempt.open(config, inputs, lease, begin, watcher.warn, *known)
            attempt.train(pool, stop, options.kill_after, options.decide, options.living, options.branch)
            result = attempt.result()
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
