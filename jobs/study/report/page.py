"""A study's page: HTML that needs nothing from elsewhere, light or dark as its reader has it.

All that it shows may be anybody's (names of trials and points, errors, notes): it is escaped, never markup.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jobs.drawing import DARK
from jobs.settings import interval_of, value_of
from jobs.study.numbers import text_of
from jobs.study.question import Answer, Plot, Study, Table
from jobs.study.report.plots import draw, left_out
from jobs.study.report.rows import FIGURES, Row, axes_of, headline, texts
from workers.common.text import visible

STYLE = """
:root { color-scheme: light dark; --text: #1d1f23; --ground: #ffffff; --line: #d9dce1; --quiet: #5f6670; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --ground: #16181d; --line: #343841; --quiet: #9aa0a6; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; line-height: 1.35; }
h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
td:first-child, td code, #trials td { white-space: nowrap; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is fetched, whatever a text should hold."""
HEADS = ("loss", "steps", "tokens", "parameters", "FLOPs", "of the optimizer", "seconds")
assert len(HEADS) == len(FIGURES)


def page(study: Study, answer: Answer, rows: Sequence[Row], counted: Sequence[Table]) -> str:
    """Return the page of a study.

    Args:
        study: what was asked.
        answer: and found.
        rows: a row for each trial.
        counted: tables of what was tuned, and of what it has cost.
    """
    parts = [
        f"<h1>{_text(headline(answer, rows))}</h1>",
        f'<p class="quiet">{_text(about(study, rows))}</p>',
        *map(_table, answer.tables),
        *map(_figure, answer.plots),
        *map(_table, counted),
        _notes(answer.notes),
        _settings(answer),
        _trials(rows),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            f'<head><meta charset="utf-8"><title>{_text(study.name)}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head>",
            "<body>",
            *(part for part in parts if part),
            "</body></html>\n",
        ]
    )


def _text(text: Any) -> str:
    return escape(visible(str(text)))


def _table(table: Table) -> str:
    rows = [[_text(text_of(cell)) for cell in row] for row in table.rows]
    return _section(table.title, _rows(table.columns, rows), table.note)


def _section(title: str, body: str, note: str = "") -> str:
    told = f'<p class="quiet">{_text(note)}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>\n{body}\n{told}</section>"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose cells are HTML."""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _figure(plot: Plot) -> str:
    """Return a plot for a light page and one for a dark page, of which a browser shows one."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(plot, DARK)}">'
    light = f'<img alt="{_text(plot.title)}" src="{_data(plot, {})}">'
    note = " ".join(filter(None, (plot.note, told_left_out(plot))))
    body = f"<figure><picture>{dark}{light}</picture><figcaption>{_text(note)}</figcaption></figure>"
    return f"<section><h2>{_text(plot.title)}</h2>\n{body}</section>"


def about(study: Study, rows: Sequence[Row]) -> str:
    """Return what a study is, in a line."""
    seeds = ", ".join(map(str, study.seeds))
    return f"Study {study.name}: {study.question.name} on {study.base_name}, {len(rows)} trials, seeds {seeds}"


def told_left_out(plot: Plot) -> str:
    """Say how many points a plot does not show; empty where it shows all."""
    number = left_out(plot)
    told = f"{number} point(s) are not shown: they are no numbers, or not above 0 on a logarithmic axis."
    return told if number else ""


def _data(plot: Plot, style: Mapping[str, Any]) -> str:
    picture = io.BytesIO()
    draw(plot, picture, style)
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"


def _notes(notes: Sequence[str]) -> str:
    found = "\n".join(f"<li>{_text(note)}</li>" for note in notes)
    return _section("Notes", f"<ul>{found}</ul>") if notes else ""


def _settings(answer: Answer) -> str:
    if not answer.settings:
        return ""
    rows = [
        [f"<code>{_text(key)}</code>", _text(value_of(one)), _text(interval_of(one)), _text(one.why)]
        for key, one in answer.settings.items()
    ]
    note = "In settings.yaml beside this page: raymuon train CONFIG --with settings.yaml"
    return _section("Settings found", _rows(["key", "value", "interval", "from"], rows), note)


def _trials(rows: Sequence[Row]) -> str:
    axes = axes_of(rows)
    columns = ["trial", *axes, "status", *HEADS, "error", "run"]
    found = [[*(_text(cell) for cell in texts(row, axes)), _link(row.link)] for row in rows]
    table = f'<div id="trials">{_rows(columns, found)}</div>'
    return _section("Trials", table, "Loss at the end, on held-out text, in nats per token.")


def _link(link: str) -> str:
    """Return a link to a run: of what is no address of the web the text, for instance the run's id."""
    if link.startswith(("http://", "https://")):
        return f'<a href="{_text(link)}" rel="noreferrer">run</a>'
    return f"<code>{_text(link)}</code>" if link else "-"
