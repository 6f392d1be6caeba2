"""Options that are refused before anything begins."""

from importlib.metadata import version

import pytest
import shellingham
from typer import TyperException
from typer.testing import CliRunner

from jobs.cli import app
from jobs.cli.options import writable
from jobs.cli.runs import way_on
from jobs.load import CONFIGS
from jobs.screen import command
from orchestrator.group.cluster import JOB_VARIABLE
from workers.common import storage
from workers.common.errors import StorageError


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", "gpu", "--table", "{folder}"], "{folder} cannot be written (it is a folder)"),
        (["doctor", "--calibration", "{file}/x/calibration.json"], "{file}/x/calibration.json cannot be written"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, arguments, told):
    (tmp_path / "file").write_text("in the way")
    places = {"folder": str(tmp_path), "file": str(tmp_path / "file")}
    found = CliRunner().invoke(app, [part.format(**places) for part in arguments], standalone_mode=False).exception
    assert isinstance(found, TyperException) and found.exit_code == 2
    assert told.format(**places) in found.format_message()


def test_the_folder_of_a_file_to_be_written_is_made(tmp_path):
    assert writable(tmp_path / "new" / "table.md") == tmp_path / "new" / "table.md"
    assert (tmp_path / "new").is_dir() and not (tmp_path / "new" / "table.md").exists()


def test_the_help_says_first_what_raymuon_is_and_names_all_built_in_configs():
    names = {file.stem for file in CONFIGS.glob("*.yaml")}
    runner = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    for arguments in (["-h"], ["--help"], []):
        told = runner.invoke(app, arguments, prog_name="raymuon").output
        usage, what, *_ = (line.strip() for line in told.splitlines() if line.strip())
        assert usage.startswith("Usage: raymuon") and what.startswith(
            "Pretrain language models with Distributed Muon on Ray"
        )
        assert all(name in told for name in names)
    for verb in ("train", "plan", "submit", "config"):
        told = runner.invoke(app, [verb, "-h"]).output
        assert all(name in told for name in names), verb


def test_the_version_is_told():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"raymuon {version('raymuon')}\n")


def test_a_shell_completes_commands_and_built_in_configs(monkeypatch):
    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("bash", "/bin/bash"))  # Whatever has started us.

    def completed(words: str) -> list[str]:
        number = str(len(words.split(" ")) - 1)
        env = {"_RAYMUON_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": number}
        return CliRunner().invoke(app, [], prog_name="raymuon", env=env).output.split()

    assert completed("raymuon tr") == ["train"] and completed("raymuon train demo-") == ["demo-chat", "demo-llama"]
    assert "complete_bash" in CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="raymuon").output


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "demo", "--price"],
        ["plan", "demo", "--mtbf"],
        ["plan", "demo", "--network"],
        ["plan", "demo", "--tokens"],
        ["plan", "demo", "--gpus"],
        ["plan", "demo", "--gpus-per-node"],
        ["stop", "run", "--wait"],
        ["replay", "run", "--tolerance"],
        ["replay", "run", "--workers"],
        ["train", "demo", "--kill-worker"],
        ["bench", "load", "--steps"],
    ],
    ids=lambda arguments: "".join(arguments[::2]),
)
def test_numbers_of_options_are_finite_and_in_range(arguments, value):
    found = CliRunner().invoke(app, [*arguments, value], standalone_mode=False).exception
    assert isinstance(found, TyperException) and found.exit_code == 2
    assert arguments[-1] in found.format_message()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["checkpoints", verb, "s3://b/run"] for verb in ("ls", "show", "verify", "rm", "pin")),
        ["checkpoints", "diff", "s3://b/run@1", "s3://b/run@2"],
        ["export", "s3://b/run", "--to", "x"],
        ["export", "s3://b/run", "--to", "x", "--series"],
        ["import", "{exported}/llama", "--to", "s3://b/new"],
        ["status", "s3://b/run"],
        ["replay", "s3://b/run"],
        ["bench", "checkpoint", "--url", "s3://b/bench"],
    ],
    ids=" ".join,
)
def test_a_command_asks_the_s3_store_that_it_is_told(exported, monkeypatch, arguments):
    """Without that it would ask AWS, where a bucket of that name may be somebody else's."""

    def asked(url: str, s3_endpoint: str = "") -> None:
        raise StorageError(f"{url} at {s3_endpoint}")

    monkeypatch.setattr(storage, "open_place", asked)
    arguments = [part.format(exported=exported) for part in arguments]
    endpoint = "http://127.0.0.1:9"
    found = CliRunner().invoke(app, [*arguments, "--s3-endpoint", endpoint], standalone_mode=False).exception
    assert isinstance(found, StorageError) and "s3://b/" in str(found) and str(found).endswith(f" at {endpoint}")


def test_the_way_on_is_a_command_that_can_be_pasted(monkeypatch):
    monkeypatch.setattr("sys.argv", ["raymuon", "train", "my run.yaml", "--json"])
    raymuon = command("raymuon")  # With its path, where it is not on PATH.
    assert way_on(["my run.yaml"], None, "") == (
        f"nothing has begun; begin again with: {raymuon} train 'my run.yaml' --json"
    )
    told = way_on(["my run.yaml", "data.source=a b"], "10.0.0.1:6379", "abc")
    assert told == f"go on with: {raymuon} train 'my run.yaml' 'data.source=a b' --address 10.0.0.1:6379 --resume abc"
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    assert way_on(["config.yaml"], "auto", "abc") == "go on with: raymuon resume abc", "a job's folder goes with it"
