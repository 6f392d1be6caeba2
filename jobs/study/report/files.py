"""The tables of a report for programs and for other pages: CSV, JSON, Markdown."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.settings import interval_of, value_of
from jobs.study.numbers import plain, text_of
from jobs.study.question import Answer, Study, Table
from jobs.study.report.page import HEADS, about, told_left_out
from jobs.study.report.rows import FIGURES, Row, axes_of, cells, headline, texts
from jobs.tell import json_text
from workers.common.text import visible


def trials_csv(rows: Sequence[Row]) -> str:
    """Return a row for each trial: numbers so that reading them gives the same ones, empty cells for what is not."""
    axes, file = axes_of(rows), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", *(f"axis.{axis}" for axis in axes), "status", *FIGURES, "error", "run_id", "settings"])
    for row in rows:
        run_id = row.outcome.run_id if row.outcome else None
        writer.writerow([*cells(row, axes), run_id, json.dumps(plain(row.trial.settings))])
    return file.getvalue()


def answer_json(study: Study, answer: Answer, rows: Sequence[Row]) -> str:
    """Return all that was asked, found and tried as one JSON object; NaN and infinity are null."""
    trials = [
        {"trial": plain(row.trial), "status": row.status, "outcome": _outcome(row), "link": row.link} for row in rows
    ]
    asked = {**plain(study), "base": study.base_name}
    return json_text({"study": asked, "answer": plain(answer), "trials": trials}, indent=1) + "\n"


def _outcome(row: Row) -> Any:
    """Return a trial's outcome without its series, which the run has."""
    if row.outcome is None:
        return None
    return {key: value for key, value in plain(row.outcome).items() if key not in ("losses", "validation")}


def markdown(
    study: Study, answer: Answer, rows: Sequence[Row], counted: Sequence[Table], pictures: Mapping[str, str]
) -> str:
    """Return the report as a page of the documentation, without links: whoever reads it has not the runs.

    Args:
        study: what was asked.
        answer: and found.
        rows: a row for each trial.
        counted: tables of what was tuned, and of what it has cost.
        pictures: files of the plots, by name.
    """
    axes = axes_of(rows)
    told = [f"# {_text(headline(answer, rows))}", _about(study, rows)]
    told += [_table(table) for table in answer.tables]
    for plot in answer.plots:
        note = " ".join(filter(None, (plot.note, told_left_out(plot))))
        told += [f"## {_text(plot.title)}", f"![{_text(plot.title)}]({pictures[plot.name]})", _text(note)]
    told += [_table(table) for table in counted]
    if answer.notes:
        told += ["## Notes", "\n".join(f"- {_text(note)}" for note in answer.notes)]
    if answer.settings:
        found = [[key, value_of(one), interval_of(one), one.why] for key, one in answer.settings.items()]
        told.append(_table(Table(title="Settings found", columns=["key", "value", "interval", "from"], rows=found)))
    trials = [texts(row, axes) for row in rows]
    columns = ["trial", *axes, "status", *HEADS, "error"]
    told.append(_table(Table(title="Trials", columns=columns, rows=trials)))
    return "\n\n".join(filter(None, told)) + "\n"


def _about(study: Study, rows: Sequence[Row]) -> str:
    return f"{_text(about(study, rows))}."


def _table(table: Table) -> str:
    lines = [f"| {' | '.join(map(_text, table.columns))} |", "| --- " * len(table.columns) + "|"]
    lines += [f"| {' | '.join(_text(text_of(cell)) for cell in row)} |" for row in table.rows]
    parts = [f"## {_text(table.title)}", "\n".join(lines), _text(table.note)]
    return "\n\n".join(filter(None, parts))


def _text(text: Any) -> str:
    """Return a text of anybody's that Markdown and its HTML show as it is, on one line."""
    plain = " ".join(visible(str(text)).split())
    for sign in "\\`*[]|<":
        plain = plain.replace(sign, f"\\{sign}")
    return plain.replace("&", "&amp;")
