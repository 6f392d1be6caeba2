"""`raymuon replay`: train a stretch of a run once more, on this machine, and compare it with the record.

The config, the data and the checkpoint before the stretch come from the run; nothing is written where the run is. At
the run's own world size, on the same kind of hardware and with the same code, every loss and every gradient norm is the
same float. Otherwise they are equal within a tolerance, or the first step that is not is named.
"""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.load import load_values
from jobs.record import OTHER_PRECISION, TOLERANCE, Attempt, Comparison, Record, attempt_of, compare, read_record
from jobs.runs import TrackedRun, find
from jobs.screen import Screen
from jobs.table import print_table
from jobs.tell import json_text, tell
from jobs.watch import TerminalWatcher
from optim.config import precision_on
from orchestrator.config import DEFAULT_TRACKING_URI, RunConfig, absolute
from orchestrator.driver import Options, run
from orchestrator.group.cluster import is_local
from orchestrator.group.usage import memory_here
from orchestrator.identity import identity, refuse_other
from orchestrator.log.run_log import RunLog
from orchestrator.origin import read_origin
from orchestrator.preflight import corpora_of
from orchestrator.record.events import Event, Membership
from orchestrator.record.journal import read_journal
from orchestrator.record.provenance import changes, provenance
from orchestrator.record.result import RunResult
from orchestrator.stop import StopSignal
from orchestrator.stretch import Stretch
from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError, StorageError, TrainingError
from workers.data.corpus import Corpus
from workers.data.prepare import prepare
from workers.recipe import TrainConfig
from workers.reports import Report, StepDone, Validated
from workers.task import Origin

if TYPE_CHECKING:
    from orchestrator.record.tracking import RunRecord

FOLDER = "runs/replays"
EXPERIMENT = "raymuon-replays"
SHOWN = 12
"""Rows of the table."""


@dataclass(frozen=True)
class Request:
    """What a person asks for."""

    run: str
    steps: str = ""
    """`A:B`; one side may be missing."""
    tracking_uri: str = DEFAULT_TRACKING_URI
    """Of the MLflow that has the run."""
    s3_endpoint: str = ""
    address: str | None = None
    workers: int | None = None
    tolerance: float | None = None
    overrides: tuple[str, ...] = ()


def replay(request: Request, stop: StopSignal, as_json: bool) -> None:
    """Replay, and say how it compares; with `as_json` as one JSON object on the last line of stdout.

    Raises:
        ConfigError: there is nothing to replay, or not here.
        TrainingError: a step differs by more than the tolerance.
        Interrupted: a person has ended it.
        RaymuonError: whatever else goes wrong in a training.
    """
    console = Screen(stderr=as_json)
    found = find(request.run, request.tracking_uri, request.s3_endpoint)
    warn = lambda text: console.print(text, style="yellow")  # noqa: E731
    record = read_record(read_journal(found.store, warn))
    log = RunLog(found.store)
    first, last = stretch_of(request.steps, record, log)
    url, manifest = found.url, _checkpoint_before(log, first)
    if manifest is None and (parent := branched_from(record, first, request.s3_endpoint)) is not None:
        url, manifest = parent.run_url, parent.manifest
    begin = manifest.step + 1 if manifest else 1
    attempt = attempt_of(record, begin, last)
    config = _config(request, found, record, attempt, begin)
    if manifest is not None:  # What the run began with may be gone by now.
        config = replace(config, train=replace(config.train, init="", init_state="weights"))
    corpora = _corpora(config, attempt, warn)
    if log.identity is not None:
        refuse_other(found.url, log.identity, identity(config, corpora), last)
    if is_local(request.address):
        from jobs.planning.here import look_here  # Imports torch.

        look_here(config, config.scaling.max_workers, memory_here()[1], warn)
    for line in changes(attempt.provenance, provenance()):
        warn(f"the code is not the run's: {line}")
    source = f"the checkpoint of step {manifest.step}" if manifest else "the run's start"
    console.print(f"steps {first} to {last} of run {found.run_id}, from {source}, {_workers(config)}")

    replayed = Record()

    def comparison() -> Comparison:
        was = precision_of(attempt.config["train"]["precision"], record.devices[begin])
        now = precision_of(config.train.precision, replayed.devices[begin])
        known = TOLERANCE if was == now else OTHER_PRECISION
        return compare(record, replayed, known if request.tolerance is None else request.tolerance)

    def keep(result: RunResult, run_record: "RunRecord") -> None:
        if result.status == "finished":
            _keep(run_record, found, comparison())

    def as_recorded(config: RunConfig, *_: Sequence[str]) -> TrainConfig:
        """Take what was chosen when these steps were trained; older records saved no memory."""
        chosen = {key: value for key, value in record.chosen[begin].items() if key in config.train.open}
        return replace(config.train, **chosen).plain()

    options = Options(
        decide=as_recorded,
        stretch=Stretch(run_url=url, manifest=manifest, corpora=corpora, last_step=last),
        artifacts=keep,
    )
    with _Listener(replayed) as watcher:
        result = run(config, "never", request.address, watcher, stop, options)
    if result.status != "finished":
        raise stop.interrupted(f"interrupted at step {result.steps} of {last}")
    compared = comparison()
    _show(console, compared, first, last)
    summary = _summary(found, result, record, compared, first, last, begin)
    if as_json:
        tell(summary)
    if (beyond := compared.first_beyond) is not None:
        raise TrainingError(
            f"the replay differs: {beyond.metric} of step {beyond.step} is {beyond.replayed:.9g}, on record is "
            f"{beyond.recorded:.9g}, a relative difference of {beyond.relative:.2g} (allowed: "
            f"{compared.allowed(beyond.metric):.2g}){_hint(summary)}"
        )


def stretch_of(steps: str, record: Record, log: RunLog) -> tuple[int, int]:
    """Return the first and the last step of `A:B`; what is missing is from the newest checkpoint to the last step.

    Raises:
        ConfigError: it says something else.
    """
    if not record.steps:
        raise ConfigError(f"{log.store.url}: no step is on record yet; a run puts its steps down with each checkpoint")
    newest = max(record.steps)
    before = [commit.step for commit in log.commits if commit.step < newest]
    given_first, colon, given_last = steps.partition(":")
    try:
        last = int(given_last or newest) if colon or not given_first else int(given_first)
        first = int(given_first or max((step for step in before if step < last), default=0) + 1)
    except ValueError:
        first, last = 1, 0
    if not 1 <= first <= last:
        raise ConfigError(f"--steps {steps}: write it as A:B, with 1 <= A <= B, for instance 101:120")
    return first, last


def _checkpoint_before(log: RunLog, first: int) -> Manifest | None:
    """Return the newest checkpoint from which step `first` can be reached; None for the start."""
    commits = [commit for commit in log.commits if commit.step < first]
    newest = max(commits, key=lambda commit: (commit.step, commit.number), default=None)
    return newest and Manifest.read(log.store, newest.manifest, newest.sha256)


def branched_from(record: Record, first: int, endpoint: str) -> Origin | None:
    """Return the checkpoint from which a branch's first steps go on; None where the run is no branch.

    Raises:
        ConfigError: it is gone, or the steps are before it.
    """
    begun = next(iter(record.attempts.values()), None)
    train = begun.config["train"] if begun else {}
    if train.get("init_state") != "run":
        return None
    origin = read_origin(train["init"], endpoint)
    if first <= origin.manifest.step:
        raise ConfigError(
            f"--steps: step {first} is before the first of this branch, {origin.manifest.step + 1}; replay its parent, "
            f"{origin.manifest.run_id}"
        )
    return origin


def _config(request: Request, found: TrackedRun, record: Record, attempt: Attempt, begin: int) -> RunConfig:
    """Return the run's config with places, workers and record of this machine."""
    config = load_values(attempt.config, list(request.overrides), f"of run {found.run_id}")
    world_size = request.workers or int(record.steps[begin]["world_size"])
    cpus = config.scaling.cpus_per_worker
    if is_local(request.address):  # Any world size on any machine: with fewer processors it takes longer.
        cpus = min(cpus, max(0.01, math.floor(100 * len(os.sched_getaffinity(0)) / world_size) / 100))
    endpoint = request.s3_endpoint or config.storage.s3_endpoint
    return absolute(
        replace(
            config,
            run=replace(config.run, name=f"replay of {config.run.name}"),
            data=replace(config.data, ledger=""),
            scaling=replace(
                config.scaling,
                min_workers=world_size,
                max_workers=world_size,
                standby=0,
                accelerator="auto",
                cpus_per_worker=cpus,
            ),
            checkpoint=replace(config.checkpoint, url=FOLDER, every=0, at=()),
            storage=replace(config.storage, s3_endpoint=endpoint),
            tracking=replace(config.tracking, uri=DEFAULT_TRACKING_URI, experiment=EXPERIMENT),
        )
    )


def _corpora(config: RunConfig, attempt: Attempt, warn: Callable[[str], object]) -> tuple[Corpus, ...]:
    """Return the run's own prepared sources; where one cannot be read, the same text prepared here will do.

    Whether it is the same is the run's log to say, which has its hash.
    """
    endpoint = config.storage.s3_endpoint
    try:
        return corpora_of(attempt.corpora, endpoint)
    except StorageError as error:
        warn(f"the run's own tokens cannot be read here ({error}); its text is prepared anew")
        here = replace(config.data, prepared_url=str(Path("runs/data").resolve()))
        return prepare(here, s3_endpoint=endpoint)


def _workers(config: RunConfig) -> str:
    count = config.scaling.max_workers
    return f"{count} worker{'s' if count > 1 else ''}"


def precision_of(precision: str, devices: tuple[str, ...]) -> str:
    """Return what `train.precision` is on the devices of a group."""
    return precision_on("cpu" if all(device == "cpu" for device in devices) else "cuda", precision)


class _Listener(TerminalWatcher):
    """Shows the replay, and puts its rows down."""

    def __init__(self, into: Record) -> None:
        super().__init__()
        self.into = into
        self.devices: tuple[str, ...] = ()

    def event(self, event: Event) -> None:
        if isinstance(event, Membership):
            self.devices = event.devices
        super().event(event)

    def report(self, report: Report) -> None:
        match report:
            case StepDone():
                self.into.steps[report.step] = {"loss": report.loss, "grad_norm": report.grad_norm}
                self.into.devices[report.step] = self.devices
            case Validated():
                self.into.validations[report.step] = report.loss
        super().report(report)


def _hint(summary: dict[str, Any]) -> str:
    """Return what may be behind a difference at another world size, where sums are rounded in another order."""
    if summary["recorded_world_sizes"] == [summary["world_size"]]:
        return ""
    steps = summary["steps"][1] - summary["trained_from"]
    sizes = " and ".join(map(str, summary["recorded_world_sizes"]))
    return (
        f". The record has {sizes} worker(s) there, and rounding adds up over {steps} step(s), faster once a token's "
        "experts change: a shorter stretch, or one with as many workers, says more"
    )


def _keep(record: "RunRecord", found: TrackedRun, comparison: Comparison) -> None:
    """Put the comparison beside the replay's own MLflow run."""
    record.tag("raymuon.replay_of", found.run_id)
    record.tag("raymuon.replay", _verdict(comparison))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay.json"
        path.write_text(json_text([asdict(one) for one in comparison.differences], indent=1))
        record.artifact(path)


def _verdict(comparison: Comparison) -> str:
    if comparison.bitwise_equal:
        return "bitwise equal"
    return "different" if comparison.first_beyond else "equal within the tolerance"


def _show(console: Screen, comparison: Comparison, first: int, last: int) -> None:
    """Print the steps that say most, and the verdict."""
    head = ("step", "metric", "on record", "replayed", "relative difference")
    rows = [one for one in comparison.differences if first <= one.step <= last]
    if (different := comparison.first_different) is not None:
        rows = [one for one in comparison.differences if one.step >= different.step]
    cells = []
    for one in rows[:SHOWN]:
        told = "bitwise equal" if one.equal else f"{one.relative:.2g}"
        cells.append((str(one.step), one.metric, f"{one.recorded:.9g}", f"{one.replayed:.9g}", told))
    print_table(console, head, cells)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more numbers", style="dim")
    for largest in filter(None, map(comparison.largest, ("loss", "grad_norm", "val_loss"))):
        if not largest.equal:
            console.print(f"largest relative difference of {largest.metric}: {largest.relative:.2g} at {largest.step}")
    if comparison.bitwise_equal:
        console.print(f"bitwise equal: {len(comparison.differences)} numbers", style="green")
    elif comparison.first_beyond is None:
        console.print(f"equal within the tolerance of {comparison.tolerance:g}", style="green")


def _summary(
    found: TrackedRun, result: RunResult, record: Record, comparison: Comparison, first: int, last: int, begin: int
) -> dict[str, Any]:
    told: Callable[[Any], Any] = lambda one: one and {**asdict(one), "relative": one.relative}  # noqa: E731
    return {
        "run": found.run_id,
        "steps": [first, last],
        "trained_from": begin - 1,
        "world_size": result.world_size,
        "recorded_world_sizes": sorted({int(record.steps[step]["world_size"]) for step in range(begin, last + 1)}),
        "verdict": _verdict(comparison),
        "bitwise_equal": comparison.bitwise_equal,
        "compared": len(comparison.differences),
        "tolerance": comparison.tolerance,
        "first_different": told(comparison.first_different),
        "largest_loss": told(comparison.largest("loss")),
        "largest_grad_norm": told(comparison.largest("grad_norm")),
        "replay": result.run_id,
        "checkpoint": result.checkpoint,
    }
