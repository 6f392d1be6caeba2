"""A run that cannot fit into this machine is refused before Ray starts."""

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.load import load
from jobs.planning import here
from workers.common.errors import ConfigError


def refused(*arguments: str) -> str:
    error = CliRunner().invoke(app, ["train", *arguments], standalone_mode=False).exception
    assert getattr(error, "exit_code", None) == 2, error
    return error.format_message() if hasattr(error, "format_message") else str(error)


def test_what_clearly_does_not_fit_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    text = refused("moonlight-16b", "scaling.min_workers=1", "scaling.max_workers=1")
    assert "moonlight-16b does not fit: " in text and "weights 63.8 GB" in text and "--no-look" in text
    assert list(tmp_path.iterdir()) == [], "neither runs/ nor a database"


@pytest.mark.parametrize(("share", "outcome"), [(0.5, "refused"), (0.85, "tight"), (1.05, "tight"), (3.0, "fits")])
def test_an_estimate_refuses_only_what_is_far_beyond(share, outcome):
    config, warned = load("demo", []), []
    told = here.look_here(config, 2, 10**12, warned.append)
    assert told.startswith("1,0") and "parameters; 2 workers of about" in told and not warned
    needed = float(told.split(" need ")[1].split(" ")[0].replace(",", "")) * 1e9
    free = int(share * needed)
    if outcome == "refused":
        with pytest.raises(ConfigError, match="demo does not fit"):
            here.look_here(config, 2, free, warned.append)
    else:
        assert here.look_here(config, 2, free, warned.append)
        assert len(warned) == (outcome == "tight")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--kill-worker", "999"], "--kill-worker 999: must be less than train.steps=400"),
        (["--kill-worker", "400"], "must be less than train.steps=400"),
        (["--kill-worker", "0"], "--kill-worker"),
        (["--kill-worker", "-3"], "--kill-worker"),
        (["--kill-worker", "1", "scaling.max_workers=1"], "needs scaling.max_workers=2"),
    ],
)
def test_a_worker_that_cannot_be_killed_then_is_told_before_anything_starts(tmp_path, monkeypatch, arguments, problem):
    monkeypatch.chdir(tmp_path)
    assert problem in refused("demo", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_workers_are_no_more_than_there_is_room_for():
    assert here.workers_here(load("demo", ["scaling.max_workers=2", "scaling.cpus_per_worker=0.01"])) == 2
    assert here.workers_here(load("demo", ["scaling.max_workers=2", "scaling.cpus_per_worker=100000"])) == 1
