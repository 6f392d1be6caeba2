"""`raymuon study run`, `status` and `report`: a study from its file to its report, and what MLflow has of it."""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.origin import with_checkpoint
from jobs.screen import Screen, mlflow_page
from jobs.study.engine import Data, Engine
from jobs.study.file import SHIPPED, StudyFile, configs_of, load_study, refuse
from jobs.study.progress import hours, told
from jobs.study.question import Answer, Outcome
from jobs.study.record import StudyRecord, stored_study, workers_of
from jobs.study.screen import StudyScreen
from jobs.study.state import StudyState
from jobs.submit import STUDY, tracking_of
from jobs.table import print_table
from jobs.tell import tell
from orchestrator.config import DEFAULT_TRACKING_URI, RunConfig, TrackingConfig, absolute
from orchestrator.group.cluster import connected, is_local
from orchestrator.group.handles import Joined
from orchestrator.group.warm import warm
from orchestrator.log.lease import Holder, Lease, await_free
from orchestrator.origin import find_origin
from orchestrator.preflight import in_background, run_store
from orchestrator.reach import reach_tracking
from orchestrator.stop import StopSignal
from workers.common.errors import ClusterError, ConfigError, RaymuonError, StorageError, TrainingError
from workers.common.storage import Store

if TYPE_CHECKING:
    from orchestrator.record.tracking import Tracking

REPORTS = Path("runs/studies")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asks for."""

    source: str
    """A study's file or the name of a shipped one; of a status or a report also its run."""
    overrides: tuple[str, ...] = ()
    name: str = ""
    """Of the study, in the place of the file's."""
    tracking_uri: str = ""
    """In the place of the config's."""
    address: str | None = None
    at_once: int = 0
    """Trials at a time; 0: as many as the cluster has room for."""
    again_failed: bool = False
    """Train failed trials again."""

    @property
    def places(self) -> dict[str, Any]:
        """Settings over all others."""
        return {"tracking.uri": self.tracking_uri} if self.tracking_uri else {}


def run(request: Request, stop: StopSignal, as_json: bool) -> None:
    """Run a study, or go on with it, and write its report.

    Raises:
        ConfigError: it is refused; nothing has run then.
        Interrupted: a person has ended it; it can go on.
        RaymuonError: a trial is not done, with the exit code of what went wrong; the others are.
    """
    found = load_study(request.source, request.overrides, request.name)
    configs = beforehand(found, request.places)
    first = next(iter(configs.values()))
    with StudyScreen() as screen:
        data = Data(request.address, screen.console)
        for config in configs.values():
            data.of(config, stop)
        with stop.abruptly():
            reach_tracking(first.tracking.uri, first.tracking.experiment)
            record, is_new = find_or_make(found, tracking_of(first.tracking.uri, first), configs.values())
        stop.run_id = record.run_id
        screen.say(f"study {found.study.name}, run {record.run_id}")
        screen.say(f"MLflow:     {mlflow_page(record.tracking.uri, record.tracking.page(record.run_id))}")
        store = run_store(first, record.run_id)
        if not is_new:
            _await_free(store, found.study.name, screen, stop)
        with Lease(store, strict=False) as lease:
            state = StudyState(found, record, request.places)
            state.configs |= configs
            answer, folder = _run(state, request, data, lease, screen, stop)
    _tell_answer(state, answer, folder, as_json)


def _run(
    state: StudyState, request: Request, data: Data, lease: Lease, screen: StudyScreen, stop: StopSignal
) -> tuple[Answer, Path]:
    """Train what is left, and write the report; the record's status is what came of it."""
    record = state.record
    try:
        state.go_on(request.again_failed)
        record.status("RUNNING")
        if state.left:
            in_background(lambda: importlib.import_module("jobs.planning.choice"), may_be_torn=True)  # Imports torch.
            screen.say("starting Ray ...")
            with connected(request.address, stop) as cluster, warm(cluster) as joined:
                at_once = _at_once(request, joined, [*state.configs.values()])
                engine = Engine(state, data, joined, at_once, stop, screen, lease.check)
                engine.run()
            _check_done(state, engine, stop)
        answer, folder = _report(state, REPORTS / record.run_id)
        record.attach(folder)
        record.answered(answer.headline)
        record.status("FINISHED")
    except BaseException as error:
        with suppress(StorageError):  # The first error is the one to tell.
            record.status("KILLED" if isinstance(error, RaymuonError) and error.exit_code == 130 else "FAILED")
        raise
    return answer, folder


def status(request: Request, as_json: bool) -> None:
    """Show how far a study is, from MLflow alone."""
    with _stored(request) as state:
        now = state.account(None, 1)
        rows = [_row(state, name) for name in _names(state)]
        if as_json:
            tell({"study": state.found.study.name, "run_id": state.record.run_id, **asdict(now), "trials": rows})
            return
        console = Screen()
        console.print(f"study {state.found.study.name}, run {state.record.run_id}: {told(now)}")
        head = ("trial", "state", "step", "loss", "val_loss", "seconds", "run")
        print_table(console, head, [[_cell(row[key]) for key in head] for row in rows])
        for row in rows:
            if row["error"]:
                console.print(f"{row['trial']}: {row['error']}", style="yellow")


def report(request: Request, out: str, as_json: bool) -> None:
    """Write a study's report from MLflow alone."""
    with _stored(request) as state:
        answer, folder = _report(state, Path(out) if out else REPORTS / state.record.run_id)
        _tell_answer(state, answer, folder, as_json)


def beforehand(found: StudyFile, places: Mapping[str, Any]) -> dict[str, RunConfig]:
    """Return the config of each trial that is known before anything runs.

    Raises:
        ConfigError: with everything that is wrong with them, or there are none.
    """
    study = found.study
    study.question.check(study)
    trials = study.question.trials(study, {})
    if not trials:
        raise ConfigError(f"study {study.name}: question.name={study.question.name} asks for no trial at all")
    configs, problems = configs_of(found, trials, places, {})
    refuse(study, problems)
    return configs


def find_or_make(found: StudyFile, tracking: "Tracking", configs: Iterable[RunConfig]) -> tuple[StudyRecord, bool]:
    """Return the study's run, and whether it is a new one.

    Raises:
        ConfigError: a trial of a new one begins with a checkpoint that is not there, or not its own kind.
    """
    if (known := StudyRecord.find(tracking, found.study.name)) is not None:
        return known, False
    for config in {config.train.init: config for config in configs}.values():
        find_origin(absolute(with_checkpoint(config, lambda text: None)))
    return StudyRecord.create(tracking, found), True


def _await_free(store: Store, name: str, screen: StudyScreen, stop: StopSignal) -> None:
    """Wait until no other process runs the study: as long as its lease, where it was killed.

    Raises:
        ClusterError: one does.
    """
    holder = Holder.read(store)
    if holder is not None and holder.held:
        screen.say("looking whether another process runs this study, for 15 s at most ...")
    with stop.abruptly():
        try:
            await_free(store)
        except ClusterError as error:
            who = f"process {holder.pid} on {holder.host} runs" if holder else "another process runs"
            raise ClusterError(f"study {name}: {who} it; wait for it, or end that one first") from error


def _at_once(request: Request, joined: Joined, configs: list[RunConfig]) -> int:
    """Return how many trials to train at a time: more than there is room for only where nodes may come.

    Raises:
        ClusterError: a local Ray has no room for one.
    """
    room = max(1, min(joined.slots(config.scaling).room() // workers_of(config) for config in _sizes(configs)))
    return min(request.at_once or room, room) if is_local(request.address) else request.at_once or room


def _sizes(configs: list[RunConfig]) -> list[RunConfig]:
    """Return a config of each reservation that is asked for."""
    return [*{repr(config.scaling): config for config in configs}.values()]


def _check_done(state: StudyState, engine: Engine, stop: StopSignal) -> None:
    """Raise where trials are not done.

    Raises:
        Interrupted: a person has ended the study.
        RaymuonError: what the first of them has met.
    """
    left = len(state.left)
    if stop.requests and left:
        raise stop.interrupted(f"stopped with {len(state.done)} trial(s) done and {left} left")
    if engine.open:
        name, error = next(iter(engine.open.items()))
        raise type(error)(
            f"study {state.found.study.name}: {left} trial(s) are not done, {len(state.done)} are; the same command "
            f"goes on with them. {name}: {error}"
        )


def _report(state: StudyState, folder: Path) -> tuple[Answer, Path]:
    """Answer the question and write it down.

    Raises:
        TrainingError: no trial has finished.
        ConfigError: none has ended.
    """
    study, done = state.found.study, state.done
    if not done:
        raise ConfigError(f"study {study.name}: no trial of it has ended yet; see raymuon study status")
    if not any(one.status == "finished" for one in done.values()):
        name, one = next(iter(done.items()))
        raise TrainingError(f"study {study.name}: all {len(done)} trial(s) have failed. {name}: {one.error}")
    from jobs.study.report.write import write_report

    answer, record = study.question.answer(study, done), state.record
    links = {one.trial: record.address(one.run_id) for one in done.values()}
    write_report(study, done, answer, folder, links, record.run_id, next(iter(state.configs.values()), None))
    return answer, folder


@contextmanager
def _stored(request: Request) -> Iterator[StudyState]:
    """Read a study as MLflow has it.

    Raises:
        ConfigError: there is none.
    """
    uri, run = request.tracking_uri or DEFAULT_TRACKING_URI, request.source
    if Path(run).is_file() or (SHIPPED / f"{run}.yaml").exists():
        found = load_study(run, (), request.name)
        uri, run = next(iter(beforehand(found, request.places).values())).tracking.uri, found.study.name
    reach_tracking(uri)
    from orchestrator.record.tracking import Tracking, look_up  # MLflow takes seconds to import.

    known = look_up(uri, run)
    if STUDY not in known.data.tags:
        raise ConfigError(f"run {known.info.run_id} is no study; give the run of one, or its file")
    record = StudyRecord(Tracking(TrackingConfig(uri=uri)), known.info.run_id)
    with stored_study(uri, known.info.run_id) as stored:
        state = StudyState(stored, record, {})
        state.read()
        yield state


def _names(state: StudyState) -> list[str]:
    return [*dict.fromkeys([trial.name for trial in state.trials] + [*state.begun])]


def _row(state: StudyState, name: str) -> dict[str, Any]:
    """Return what there is to say of a trial."""
    begun, done = state.begun.get(name), state.done.get(name)
    if begun is None:
        empty = dict.fromkeys(("step", "loss", "val_loss", "seconds", "run"))
        return {"trial": name, "state": "waiting", **empty, "error": ""}
    now = done.status if done else "running" if begun.status == "RUNNING" else "open"
    return {
        "trial": name,
        "state": now,
        "step": f"{begun.step} of {begun.cost.last_step}",
        "loss": begun.loss,
        "val_loss": done.val_loss if done else begun.val_loss,
        "seconds": done and round(done.seconds, 1),
        "run": begun.run_id,
        "error": begun.failed,
    }


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _tell_answer(state: StudyState, answer: Answer, folder: Path, as_json: bool) -> None:
    """Say what the study has found."""
    console, done = Screen(stderr=as_json), state.done.values()
    seconds = sum(outcome.seconds for outcome in done)
    console.print(f"\n{answer.headline}", style="bold")
    console.print(
        f"{_count(done, 'finished')} trials, {_count(done, 'failed')} failed, {hours(seconds / 3600)} in steps"
    )
    for key, setting in answer.settings.items():
        console.print(f"{key}={setting.value}  ({setting.why})")
    console.print(f"report: {folder}")
    if as_json:
        tell(
            {
                "study": state.found.study.name,
                "run_id": state.record.run_id,
                "headline": answer.headline,
                "facts": dict(answer.facts),
                "settings": {key: asdict(setting) for key, setting in answer.settings.items()},
                "trials": {outcome.trial: _figures(outcome) for outcome in done},
                "report": str(folder.absolute()),
            }
        )


def _count(done: Any, status: str) -> int:
    return sum(outcome.status == status for outcome in done)


def _figures(outcome: Outcome) -> dict[str, Any]:
    kept = ("run_id", "status", "error", "steps", "tokens", "val_loss", "seconds", "flops", "optimizer_flops")
    return {key: getattr(outcome, key) for key in kept}
