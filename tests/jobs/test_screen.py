"""Texts of others on the terminal, and commands for people."""

import ast
import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from jobs import screen
from jobs.screen import Screen, command, mlflow_page
from workers.common.text import visible

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\u202ee\ud800f\x00g\rh"
TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
"""Unicode's kinds of characters that turn the direction of writing, but for the marks."""
SHOWN = r"a\x1b]0;title\x07b\x1b[2Jc\x9b31md\u202ee\ud800f\x00g\rh"


@pytest.mark.parametrize("text", ["runs/[a]/[/b]", "[red]x[/red]", ":smile: [bold", "é 日本 😀 a\tb\nc", "x" * 300])
def test_a_text_is_shown_as_it_is(text):
    output = io.StringIO()
    Screen(file=output, width=80).print(text)
    assert output.getvalue().split() == text.split()


@pytest.mark.parametrize("kind", ["text", "cell", "Text"])
def test_nothing_that_is_shown_steers_the_terminal(kind):
    output = io.StringIO()
    out = Screen(file=output, width=300, force_terminal=True)
    table = Table("name")
    table.add_row(HOSTILE if kind == "cell" else "a")
    shown = {"text": HOSTILE, "Text": Text(HOSTILE)}.get(kind, table)
    out.print(shown)
    told = output.getvalue()
    assert not set(HOSTILE) & set(told) & set("\x07\x9b\u202e\ud800\x00\r") and "\x1b]" not in told
    assert "\x1b[2J" not in told and r"a\x1b]0;title" in told


def test_what_steers_becomes_an_escape_and_all_other_text_stays():
    assert visible(HOSTILE) == SHOWN and visible(SHOWN) == SHOWN
    known = "".join(map(chr, (*range(0x20, 0x7F), *range(0xA0, 0x2028), *range(0x2070, 0xD800)))) + "\t\n"
    plain = known.translate(dict.fromkeys((0x061C, 0x200E, 0x200F)))  # Marks of a direction, which none of the rest is.
    assert visible(plain) == plain
    turning = "".join(chr(c) for c in range(0x110000) if unicodedata.bidirectional(chr(c)) in TURNING)
    assert visible(turning + "\u061c\u200e\u200f").isascii() and len(turning) == 9
    assert all(visible(chr(code)) == rf"\x{code:02x}" for code in range(32) if chr(code) not in "\t\n\r")


def test_an_error_does_not_steer_the_terminal_either(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "config", "no\x1b[2Jsuch"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "\x1b" not in done.stderr and r"no\x1b[2Jsuch" in done.stderr


def test_all_that_is_printed_goes_through_the_screen():
    for path in sorted((ROOT / "jobs").rglob("*.py")):
        if path == Path(screen.__file__):
            continue
        imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any(node.module == "rich.console" for node in imported), path


def test_a_command_can_be_pasted(monkeypatch, tmp_path):
    programs = Path(sys.executable).parent
    monkeypatch.chdir(programs.parent.parent)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert command("raymuon", "train", "demo", "data.source=a b") == ".venv/bin/raymuon train demo 'data.source=a b'"
    monkeypatch.chdir(tmp_path)
    assert command("raymuon", "status", "x") == f"{programs}/raymuon status x"
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin")
    assert command("raymuon", "status", "x") == "raymuon status x"
    assert mlflow_page("http://host:5000/", "#/x") == "http://host:5000/#/x"
    told = mlflow_page("sqlite:////a b/mlflow.db", "#/x").split()
    assert told[:4] == ["mlflow", "ui", "--backend-store-uri", "'sqlite:////a"] and told[-1].endswith(":5000/#/x")
