"""The Moonlight study's order, and what becomes of it when it is interrupted; its commands are others' affair."""

import fcntl
import importlib.util
import json
import signal
import sys
from dataclasses import asdict

import pytest
import typer
from typer.testing import CliRunner

from jobs.bench.process import run_json
from jobs.cli import app
from jobs.load import load
from jobs.study import moonlight as study
from workers.common.errors import BY_EXIT_CODE, ConfigError, Interrupted, StorageError, TrainingError


class Commands:
    """Stands in for the commands: keeps what they are given, and tells what they would."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []
        self.interrupted_at = -1
        self.places: set = set()

    def run(self, command, folder=None, **environment):
        self.given.append(command[1:])
        self.places.add((folder, *sorted(environment.items())))
        if len(self.given) == self.interrupted_at:
            for name in ("tokenizer", "spectra", "exported"):
                (folder / name).mkdir(exist_ok=True)
                (folder / name / "half").touch()
            raise KeyboardInterrupt
        loss = float(sum(map(ord, "".join(command[3:]).replace(str(folder), ""))))  # Another one for each command.
        figures = [{"task": "stdlib_text", "metric": "bits_per_byte", "value": loss}]
        group = {"entropy": 0.25, "higher": 3, "pairs": 4}
        return {
            "val_loss": loss,
            "val_loss_start": 9.0,
            "val_bits_per_byte": 1.5,
            "steps": 4,
            "wall_s": 1.0,
            "recoveries": 1,
            "checkpoint": "runs/1",
            "checkpoints": [{"figures": figures}],
            "differences": [{"groups": {"experts": group}}],
        }


@pytest.fixture
def commands(monkeypatch):
    made = Commands()
    monkeypatch.setattr(study, "run_json", made.run)
    monkeypatch.setattr(study, "_export", lambda place, *_: str(place.told("export", "export", makes="exported")))
    return made


def studied(folder, seeds=1, quick=False, said=None) -> dict:
    return study.moonlight(folder, seeds, (said if said is not None else []).append, quick)


def test_every_command_is_taken_and_all_runs_of_a_kind_have_the_same_but_for_what_is_compared(commands, tmp_path):
    studied(tmp_path, seeds=2)
    configs = {}
    for name, *rest in commands.given:
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        if sub := getattr(command, "commands", None):
            command, rest = sub[rest[0]], rest[1:]
        if name != "export":  # The fixture's.
            given = command.make_context(name, list(rest), resilient_parsing=False).params
        if name == "train":
            configs |= {(config := load(given["config"], given["overrides"])).run.name: asdict(config)}
    assert list(configs)[:2] == ["muon", "adamw"] and len(configs) == 2 + 4 * 2
    for first, *others in (list(configs.values())[:2], list(configs.values())[2:]):
        for other in others:
            differ = {f"{key}.{name}" for key in first for name in _differing(first[key], other[key])}
            assert differ <= {"run.name", "optim.name", "optim.lr", "train.init", "train.stages", "seed."}
    for muon, adamw in zip(*(configs[name]["train"]["stages"] for name in ("muon", "adamw")), strict=True):
        assert set(_differing(muon, adamw)) <= {"lr", "final_lr"}
        for key in ("lr", "final_lr"):
            if muon[key] > 0:
                assert adamw[key] / muon[key] == pytest.approx(3e-3 / 1.6e-2)
    assert {configs[name]["seed"] for name in ("muon-adamw-0", "adamw-muon-0")} == {0}
    tuned = configs["muon-adamw-1"]
    assert (tuned["seed"], tuned["train"]["init"], tuned["optim"]["name"]) == (1, "muon", "adamw")
    assert tuned["train"]["seq_len"] == configs["muon"]["train"]["seq_len"], "they are evaluated with what they know"
    uri = ("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert commands.places == {(tmp_path, uri, ("RAY_ADDRESS", "local"))}, "not the person's own"


def _differing(one, other) -> list[str]:
    if not isinstance(one, dict):
        return [""] if one != other else []
    return [key for key in one if one[key] != other[key]]


@pytest.mark.parametrize("part", [1, 3, 14, 15])
def test_an_interrupted_study_goes_on_behind_the_last_part_that_is_done(commands, tmp_path, part):
    whole = studied(tmp_path / "whole")
    everything, commands.given, commands.interrupted_at = commands.given, [], part
    with pytest.raises(KeyboardInterrupt):
        studied(tmp_path / "out")
    said: list[str] = []
    assert studied(tmp_path / "out", said=said) | {"seconds": 0} == whole | {"seconds": 0}
    names = [command[:2] for command in everything]
    assert [command[:2] for command in commands.given] == [*names[:part], *names[part - 1 :]]
    assert said[0] == f"going on in {tmp_path}/out: {part - 1} part(s) are done"
    made = {1: "tokenizer", 14: "spectra", 15: "exported"}.get(part)
    assert made is None or not (tmp_path / "out" / made).exists(), "what an interrupted part has left is gone"
    assert (tmp_path / "out" / "report.md").read_text() == (tmp_path / "whole" / "report.md").read_text()


def test_more_seeds_add_to_what_is_there(commands, tmp_path):
    studied(tmp_path)
    commands.given.clear()
    found = studied(tmp_path, seeds=2)
    assert [command[0] for command in commands.given] == ["train"] * 4
    assert all(len(losses) == 2 for losses in found["fine_tuned"].values())


def test_nothing_is_mixed(commands, tmp_path, monkeypatch):
    studied(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out: a study with another quick is there; name a new folder"):
        studied(tmp_path / "out", quick=True)
    with (tmp_path / "out" / study.MARK).open() as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"out: another process is at work in it"):
            studied(tmp_path / "out")
    monkeypatch.setattr(study, "training_code", lambda: "other")
    with pytest.raises(ConfigError, match=r"out: a study with another code is there; name a new folder"):
        studied(tmp_path / "out")


def test_what_cannot_go_well_is_told_before_anything_is_run(commands, tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ConfigError, match=r"something is there already that is no study; name a new folder"):
            studied(folder)
    with pytest.raises(StorageError, match=r"mine/out"):
        studied(tmp_path / "mine" / "out")
    for package, how in (("lm_eval", "pip install 'raymuon[eval]'"), ("transformers", "pip install transformers")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, missing=package: None if name == missing else name)
            with pytest.raises(
                ConfigError, match=f"{package} is not installed.*{how.replace('[', r'.').replace(']', '.')}"
            ):
                studied(tmp_path / "new")
    assert not commands.given and not (tmp_path / "new").exists()


def test_an_interrupt_says_how_to_go_on(commands, tmp_path, monkeypatch):
    arguments = ["study", "moonlight", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["raymuon", *arguments])
    commands.interrupted_at = 3
    found = CliRunner().invoke(app, arguments, standalone_mode=False).exception
    assert isinstance(found, Interrupted) and str(found).startswith("interrupted; go on with: ")
    assert str(found).endswith(" ".join(arguments))
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_a_command_that_fails_is_told_with_its_own_kind_of_error():
    for code, kind in {**BY_EXIT_CODE, 1: TrainingError, 7: TrainingError}.items():
        program = f"import sys; sys.stderr.write('why'); sys.exit({code})"
        with pytest.raises(kind, match=rf"ended with {code}:\nwhy") as caught:
            run_json([sys.executable, "-c", program])
        assert type(caught.value) is kind


CHILD = """
import os, pathlib, signal, sys, time
def end(*_):
    sys.stderr.write("x" * 1_000_000)  # More than a pipe holds: somebody has to read it.
    pathlib.Path("ended").write_text("by itself")
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(600)
"""


def test_an_interrupted_command_ends_by_itself(tmp_path):

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_json([sys.executable, "-c", CHILD], tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "ended").read_text() == "by itself"


def test_the_report_has_every_figure_with_its_spread(commands, tmp_path):
    found = studied(tmp_path, seeds=2)
    text = study.report(found)
    assert json.loads(json.dumps(found)) == found
    low, high = found["fine_tuned"]["muon then adamw"]
    assert f"{(low + high) / 2:.4f} ± {abs(high - low) / 2**0.5:.4f}" in text, "the deviation of a sample, from n - 1"
    assert "| experts | +0.2500 | 3 of 4 |" in text and "| muon | 9.0000 |" in text
    assert "±" not in study.report(studied(tmp_path / "one"))
