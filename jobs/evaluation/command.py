"""`raymuon evaluate`: what lm-eval's tasks find of checkpoints, on record in their run."""

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from jobs.evaluation.folder import read_folder
from jobs.evaluation.work import (
    Evaluation,
    Figure,
    Progress,
    Result,
    check_tokenizer,
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
from workers.common.errors import ConfigError

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
    console = Screen(stderr=as_json)
    with stop.abruptly():
        folder = read_folder(asked.task_folder, asked.s3_endpoint) if asked.task_folder else None
        opened = _opened(asked)
        record = _record_of(opened[0], asked, console)
    evaluation = Evaluation(
        tasks=asked.tasks,
        folder=folder,
        shots=asked.shots,
        limit=asked.limit,
        unsafe_code=asked.unsafe_code,
        batch_tokens=asked.batch_tokens,
        s3_endpoint=opened[0].s3_endpoint,
    )
    from orchestrator.evaluation import evaluate_on  # Ray takes a second to import.

    seen = _Seen(opened, record, asked.shots, console)
    evaluate_on(partial(evaluate_all, evaluation), list(seen.trained), asked.address, stop, seen.told)
    rows = [row for where, one in seen.trained.items() for row in _rows(one.step, seen.results[where].figures)]
    head = ("step", "task", "metric", "value", "standard error", "shots", "documents")
    print_table(console, head, rows)
    if as_json:
        tell(_as_json(seen))


def _opened(asked: Asked) -> list[Trained]:
    opened = (
        series(asked.what, asked.tracking_uri, asked.s3_endpoint)
        if asked.series
        else [open_trained(asked.what, asked.tracking_uri, asked.s3_endpoint)]
    )
    for one in opened:
        check_tokenizer(one)
    return opened


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
    shots: int | None
    console: Screen
    results: dict[str, Result] = field(default_factory=dict)
    said: float = 0.0

    @property
    def trained(self) -> dict[str, Trained]:
        """What is evaluated, by the name that tasks know it by."""
        return {one.where: one for one in self.opened}

    def told(self, note: Any) -> None:
        """Take a note."""
        if isinstance(note, Progress):
            self._show(note)
        elif not isinstance(note, Result):
            each = "GPU" if note.gpu else "processor"
            self.console.print(
                f"{len(self.opened)} checkpoint(s), {note.tasks} at a time, each as soon as a {each} is free",
                style="dim",
            )
        elif note.where not in self.results:
            self.results[note.where] = note
            if self.record is not None:
                self._put_down(self.trained[note.where], note)
            self.console.print(f"{note.where}: done, {len(self.results)} of {len(self.opened)}", style="dim")

    def _show(self, note: Progress) -> None:
        if time.monotonic() - self.said < TELL_S:
            return
        self.said = time.monotonic()
        far = f" {note.done:,} of {note.total:,}" if note.done else ""
        where = f"{note.where}: " if note.where else ""
        self.console.print(f"{where}{note.what}{far}", style="dim")

    def _put_down(self, trained: Trained, result: Result) -> None:
        assert trained.commit is not None
        values = _values(result.figures, self.shots)
        known = self.record.add(trained.step, trained.commit.time, values)
        for name, value in known.items():
            if abs(values[name] - value) > SAME * max(abs(value), abs(values[name])) and not name.endswith(STDERR):
                self.console.print(
                    f"step {trained.step}: {name} is {values[name]:.6g} now and {value:.6g} on record, where the first "
                    "one stays",
                    style="yellow",
                )
        names = {one.task: _named(one, self.shots) for one in result.figures}
        for task, details in result.details.items():
            self.record.keep(names[task], trained.step, details)
        self.record.write_table()


def _named(figure: Figure, shots: int | None) -> str:
    """Return the name of a task on record; with the number of shots that a person has asked for it is another one."""
    return figure.task if shots is None or figure.shots not in (shots, None) else f"{figure.task}_{shots}shot"


def _values(figures: Sequence[Figure], shots: int | None) -> dict[str, float]:
    values = {}
    for one in figures:
        name = f"{_named(one, shots)}/{one.metric}"
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


def _as_json(seen: _Seen) -> dict[str, Any]:
    record = seen.record
    return {
        "run_id": seen.opened[0].run_id,
        "recorded": record is not None,
        "mlflow_tracking_uri": record and record.uri,
        "checkpoints": [
            {
                "step": one.step,
                "url": where,
                "figures": [asdict(figure) for figure in seen.results[where].figures],
            }
            for where, one in seen.trained.items()
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
