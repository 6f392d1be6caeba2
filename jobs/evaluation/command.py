"""`raymuon evaluate`: what lm-eval's tasks find of checkpoints, on record in their run."""

import hashlib
import importlib.util
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from jobs.evaluation.folder import read_folder
from jobs.evaluation.work import (
    Deleted,
    Evaluation,
    Figure,
    Progress,
    Result,
    check_texts,
    evaluate_all,
    not_installed,
)
from jobs.runs import TrackedRun
from jobs.screen import Screen
from jobs.table import print_table
from jobs.tell import tell
from jobs.trained import Trained, open_trained, series
from orchestrator.record.metrics import STDERR
from orchestrator.stop import StopSignal
from workers.common.errors import ConfigError, StorageError

TELL_S = 2.0
"""Between two lines of how far it is."""
SAME = 1e-6
"""Relative; two values that differ by less are one, computed twice."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a person asks for."""

    what: str
    """A checkpoint, a run or a folder, as `open_trained` takes it."""
    tasks: tuple[str, ...]
    series: bool = False
    task_folder: str = ""
    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    system: str = ""
    unsafe_code: bool = False
    batch_tokens: int = 16384
    tracking_uri: str
    s3_endpoint: str = ""
    address: str | None = None


def evaluate(asked: Asked, stop: StopSignal, as_json: bool) -> None:
    """Evaluate, record, and say what came out.

    Raises:
        RaymuonError: with its exit code.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise not_installed("on this machine")
    if asked.system and not asked.chat:
        raise ConfigError("--system is the first message of a conversation: it needs --chat")
    console = Screen(stderr=as_json)
    with stop.abruptly():
        folder = read_folder(asked.task_folder, asked.s3_endpoint) if asked.task_folder else None
        opened = _opened(asked)
        _remind_of_chat(opened[0], asked, console)
        record = _record_of(opened[0], asked, console)
    evaluation = Evaluation(
        tasks=asked.tasks,
        folder=folder,
        shots=asked.shots,
        limit=asked.limit,
        chat=asked.chat,
        system=asked.system,
        unsafe_code=asked.unsafe_code,
        batch_tokens=asked.batch_tokens,
        s3_endpoint=opened[0].s3_endpoint,
    )
    from orchestrator.evaluation import evaluate_on  # Ray takes a second to import.

    seen = _Seen(opened, record, evaluation, console)
    evaluate_on(partial(evaluate_all, evaluation), list(seen.trained), asked.address, stop, seen.told)
    unrecorded = seen.put_down_rest()
    rows = [row for one, result in seen.found for row in _rows(one.step, result.figures)]
    print_table(console, ("step", "task", "metric", "value", "standard error", "shots", "documents"), rows)
    if as_json:
        tell(_as_json(seen, unrecorded is None))
    if unrecorded is not None:
        raise unrecorded
    if not seen.results:
        raise ConfigError(f"{asked.what}: the run has deleted all of these checkpoints meanwhile; evaluate it again")


def _opened(asked: Asked) -> list[Trained]:
    opened = (
        series(asked.what, asked.tracking_uri, asked.s3_endpoint)
        if asked.series
        else [open_trained(asked.what, asked.tracking_uri, asked.s3_endpoint)]
    )
    for one in opened:
        check_texts(one, asked.chat, asked.system)
    return opened


def _remind_of_chat(trained: Trained, asked: Asked, console: Screen) -> None:
    if trained.manifest.identity.get("data.chat_template") and not asked.chat:
        console.print("it was tuned with conversations: --chat asks in their template, as it was tuned", style="dim")


def _record_of(trained: Trained, asked: Asked, console: Screen) -> Any:
    """Return the record of the run in MLflow; None where there is none, or nothing belongs there."""
    if asked.limit is not None:
        console.print(
            "with --limit the figures are of a part of the documents: they are not put on record", style="dim"
        )
        return None
    run: TrackedRun | None = trained.tracked
    if run is None:
        console.print(f"{trained.where} belongs to no run in MLflow: the figures are printed alone", style="dim")
        return None
    from orchestrator.record.evaluations import EvaluationRecord  # MLflow takes seconds to import.

    return EvaluationRecord(run.tracking_uri, run.run_id)


@dataclass
class _Seen:
    """Takes what tasks tell: shows how far they are, and records what they find at once."""

    opened: list[Trained]
    record: Any
    evaluation: Evaluation
    console: Screen
    results: dict[str, Result] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    said: float = 0.0

    @property
    def trained(self) -> dict[str, Trained]:
        """What is evaluated, by the name that tasks know it by."""
        return {one.where: one for one in self.opened}

    @property
    def found(self) -> list[tuple[Trained, Result]]:
        """What has a result, in the order of steps."""
        return [(one, self.results[one.where]) for one in self.opened if one.where in self.results]

    def told(self, note: Any) -> None:
        """Take a note."""
        match note:
            case Progress():
                self._show(note)
            case Deleted(where):
                self.console.print(f"{where}: its run has deleted it meanwhile; left out", style="yellow")
            case Result(where):
                self._take(where, note)
            case _:
                self._show_tasks(note)

    def _show_tasks(self, note: Any) -> None:
        from orchestrator.evaluation import BegunAgain

        if isinstance(note, BegunAgain):
            again = ", ".join(note.places)
            self.console.print(f"a process of the evaluation was lost; begun again: {again}", style="yellow")
            return
        each = "GPU" if note.gpu else "processor"
        self.console.print(
            f"{len(self.opened)} checkpoint(s), {note.tasks} at a time, each as soon as a {each} is free", style="dim"
        )

    def put_down_rest(self) -> StorageError | None:
        """Record what MLflow has not taken before; return why it does not take it now either."""
        for one, result in self.found:
            try:
                self._put_down(one, result)
            except StorageError as error:
                return error
        return None

    def _take(self, where: str, result: Result) -> None:
        if where in self.results:  # A task that was lost and tried again.
            return
        self.results[where] = result
        try:
            self._put_down(self.trained[where], result)
        except StorageError as error:  # Hours of figures are not given up for a server that is away.
            self.console.print(f"{where}: not on record yet, and tried once more at the end: {error}", style="yellow")
        if result.silent:
            asked = ", ".join(result.silent)
            self.console.print(f"{where}: no figure of {asked}: none of its metrics is one of its kind", style="yellow")
        self.console.print(f"{where}: done, {len(self.results)} of {len(self.opened)}", style="dim")

    def _show(self, note: Progress) -> None:
        if time.monotonic() - self.said < TELL_S:
            return
        self.said = time.monotonic()
        far = f" {note.done:,} of {note.total:,}" if note.done else ""
        where = f"{note.where}: " if note.where else ""
        self.console.print(f"{where}{note.what}{far}", style="dim")

    def _put_down(self, trained: Trained, result: Result) -> None:
        if self.record is None or trained.where in self.recorded:
            return
        assert trained.commit is not None
        values = _values(result.figures, self.evaluation)
        known = self.record.add(trained.step, trained.commit.time, values)
        for name, value in known.items():
            if not name.endswith(STDERR) and _differ(values[name], value):
                self.console.print(
                    f"step {trained.step}: {name} is {values[name]:.6g} now and {value:.6g} on record, where the first "
                    "one stays",
                    style="yellow",
                )
        names = {one.task: _named(one, self.evaluation) for one in result.figures}
        for task, details in result.details.items():
            self.record.keep(names[task], trained.step, details)
        self.record.write_table()
        self.recorded.add(trained.where)


def _differ(one: float, other: float) -> bool:
    """Tell whether two values differ by more than rounding; NaN is the same as NaN."""
    return not (math.isclose(one, other, rel_tol=SAME) or (math.isnan(one) and math.isnan(other)))


def _named(figure: Figure, evaluation: Evaluation) -> str:
    """Return the name of a task on record; asked otherwise than the task itself says it is another one."""
    shots, chat = evaluation.shots, ""
    if evaluation.chat:
        system = hashlib.sha256(evaluation.system.encode()).hexdigest()[:8] if evaluation.system else ""
        chat = f"_chat-{system}" if system else "_chat"
    return f"{figure.task}{'' if shots is None or figure.shots not in (shots, None) else f'_{shots}shot'}{chat}"


def _values(figures: Sequence[Figure], evaluation: Evaluation) -> dict[str, float]:
    values = {}
    for one in figures:
        name = f"{_named(one, evaluation)}/{one.metric}"
        values[name] = one.value
        if one.stderr is not None:
            values[f"{name}{STDERR}"] = one.stderr
    return values


def _rows(step: int, figures: Sequence[Figure]) -> list[tuple[str, ...]]:
    return [
        (
            *(str(step), one.task, one.metric, f"{one.value:.4f}"),
            *("" if one.stderr is None else f"{one.stderr:.4f}", "" if one.shots is None else str(one.shots)),
            f"{one.documents:,}",
        )
        for one in figures
    ]


def _as_json(seen: _Seen, recorded: bool) -> dict[str, Any]:
    record = seen.record
    return {
        "run_id": seen.opened[0].run_id,
        "recorded": record is not None and recorded,
        "mlflow_tracking_uri": record and record.uri,
        "checkpoints": [
            {"step": one.step, "url": one.where, "figures": [asdict(figure) for figure in result.figures]}
            for one, result in seen.found
        ],
    }


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """Return the names in lists with commas.

    Raises:
        ConfigError: there is none.
    """
    names = tuple(dict.fromkeys(name.strip() for one in tasks for name in one.split(",") if name.strip()))
    if not names:
        raise ConfigError("--tasks: name one or more, for instance --tasks stdlib")
    return names
