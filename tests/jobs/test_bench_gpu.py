"""`bench gpu` in its tiny form: every row is there, with a figure or with what it lacks."""

import json
import sys
from collections import Counter

import pytest
from typer.testing import CliRunner

from jobs.bench import gpu as gpu_module
from jobs.bench.gpu_part import PARTS
from jobs.bench.gpu_rows import NEEDS_GPU, Row, attempt
from jobs.cli import app
from workers.calibrate import Calibration
from workers.common.errors import ConfigError

ROWS = {"attention": 9, "experts": 6, "memory": 3, "loss": 3, "copy": 4, "newton-schulz": 5, "speed": 24}
MEASURED = {"attention": 4, "experts": 5, "memory": 0, "loss": 2, "copy": 1, "newton-schulz": 5, "speed": 24}
"""On a CPU."""


def test_every_row_has_a_figure_or_needs_a_gpu(tmp_path):
    done = CliRunner().invoke(app, ["bench", "gpu", "--tiny", "--json", "--table", str(tmp_path / "table.md")])
    told = json.loads(done.stdout.splitlines()[-1])
    rows = told["rows"]
    figures = [row for row in rows if row["after"] is not None or row["value"] is not None]
    assert {row["problem"] for row in rows if row not in figures} == {NEEDS_GPU}
    assert not [row for row in figures if row["problem"] or not row["unit"]]
    assert Counter(row["part"] for row in rows) == ROWS
    assert Counter(row["part"] for row in figures) == Counter(MEASURED)
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(PARTS)
    names = [row["what"] for row in rows]
    assert len(names) == len(set(names))
    assert all(row["before"] is not None for row in rows if row["part"] == "memory"), "the plan's"
    assert Calibration.from_json(json.dumps(told["calibration"])).curves["matmul"].rates[-1] > 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == len(rows) + 4 and len({line.count("|") for line in lines[2:]}) == 1


def test_what_goes_wrong_is_a_row_and_the_rest_is_measured():
    def broken():
        yield Row("first", "ms", value=1.0)
        raise RuntimeError("out of\n memory")

    assert attempt("second", broken) == [
        Row("first", "ms", value=1.0),
        Row("second", problem="RuntimeError: out of memory"),
    ]


TOLD = """print('{"row": {"part": "loss", "what": "a"}}', flush=True)"""


@pytest.mark.parametrize(
    ("then", "limit", "problem"),
    [
        ("print('{\"ro'); raise SystemExit('bad\\nend')", 60.0, "ended with 1: end"),
        ("import time; time.sleep(60)", 2.0, "ended after 2 s"),
    ],
)
def test_a_part_that_ends_or_hangs_keeps_the_rows_that_it_has_told(monkeypatch, then, limit, problem):
    monkeypatch.setattr(gpu_module, "python", lambda *arguments: [sys.executable, "-c", f"{TOLD}; {then}"])
    monkeypatch.setattr(gpu_module, "WHOLE_S", limit)
    monkeypatch.setattr(gpu_module, "LEAST_S", 1.0)
    found = gpu_module.gpu(True, "loss", lambda line: None)
    assert [row["what"] for row in found["rows"]] == ["a", "loss: what is not here of it"]
    assert found["rows"][1]["problem"] == problem


def test_an_unknown_part_is_refused():
    with pytest.raises(ConfigError, match="--only los: must be one of attention, "):
        gpu_module.gpu(True, "los", lambda line: None)
