"""Tables are whole, whatever the terminal's width."""

import io
import re

import pytest

from jobs.doctor.command import show
from jobs.doctor.findings import Finding
from jobs.screen import Screen
from jobs.table import print_table

LONG = "/a/folder/[red]/" + "x" * 200
HEAD = ("run", "where", "note")
ROWS = [("a" * 32, LONG, "some words " * 20), ("b", "c", "[bold]not markup[/bold]")]


def printed(width: int, terminal: bool, wrap: bool) -> str:
    console = Screen(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_table(console, HEAD, ROWS, title="of [a]", wrap=wrap)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [1, 40, 80, 500])
@pytest.mark.parametrize(("terminal", "wrap"), [(False, False), (False, True), (True, False)])
def test_a_row_is_one_line_and_every_cell_whole(width, terminal, wrap):
    title, heads, _, first, second = (line for line in printed(width, terminal, wrap).splitlines() if line.strip())
    assert title == "of [a]" and heads.split() == list(HEAD)
    assert re.split(r"  +", first.strip()) == [cell.strip() for cell in ROWS[0]]
    assert "[bold]not markup[/bold]" in second and "…" not in first


def test_a_terminal_breaks_the_last_column_between_words():
    text = printed(80, terminal=True, wrap=True)
    assert LONG in text and "a" * 32 in text and text.count("words") == 20
    assert len(text.splitlines()) > 10


def test_the_doctors_paths_are_whole_in_a_pipe_and_in_a_terminal():
    for terminal in (False, True):
        console = Screen(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
        show([Finding("storage", "10.0.0.1", "failure", f"{LONG} cannot be written", f"chmod u+w {LONG}")], console)
        text = console.file.getvalue()
        assert text.count(LONG) == 2 and "1 failure(s), 0 warning(s)" in text
