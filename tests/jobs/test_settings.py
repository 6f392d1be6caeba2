"""Settings files of studies over configs: what a run gets, and where it says that it has it from."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from jobs.load import load, load_values, read
from jobs.settings import (
    COMMAND_LINE,
    conditions_of,
    configured,
    interval_of,
    read_settings,
    settings_yaml,
    value_of,
)
from jobs.study.question import Answer, Setting, Study
from jobs.study.questions.ablation import Ablation
from orchestrator.config import flatten
from workers.common.errors import ConfigError

STUDY = Study(name="rates", question=Ablation())
STAGES = [
    {"name": "a", "steps": 20, "global_batch": 16},
    {"name": "b", "steps": 20, "global_batch": 32, "weights": {}},
]


def found(tmp_path, name="settings.yaml", conditions=None, **settings) -> str:
    """Write a settings file of a study; __ in a name stands for a dot."""
    made = {
        key.replace("__", "."): Setting(value=value, low=None, high=2.0, why="w") for key, value in settings.items()
    }
    path = tmp_path / name
    path.write_text(settings_yaml(STUDY, Answer(headline="h", facts={}, settings=made), "run-1", conditions or {}))
    return str(path)


def test_what_is_written_is_read(tmp_path):
    file = found(tmp_path, optim__lr=0.0123456789, train__stages=STAGES, run__name="é: 'x'", optim__weight_decay=0.0)
    read_back = read_settings(file)
    assert read_back.settings == {
        "optim.lr": 0.0123456789,
        "train.stages": STAGES,
        "run.name": "é: 'x'",
        "optim.weight_decay": 0.0,
    }
    assert (read_back.study, read_back.run) == ("rates", "run-1")
    source = yaml.safe_load((tmp_path / "settings.yaml").read_text())["from"]
    assert source["question"] == "ablation" and source["keys"]["optim.lr"] == {"low": None, "high": 2.0, "why": "w"}


def test_a_settings_file_lies_over_the_config_and_under_the_command_line(tmp_path):
    one = found(tmp_path, "one.yaml", optim__lr=0.01, optim__momentum=0.9, train__steps=7)
    two = found(tmp_path, "two.yaml", optim__lr=0.02)
    made = configured("demo-llama", [one, two], ["train.steps=9", "seed=3"])
    optim, train = made.config.optim, made.config.train
    assert (optim.lr, optim.momentum, train.steps, made.config.seed) == (0.02, 0.9, 9, 3)
    assert configured("demo-llama", [two, one], []).config.optim.lr == 0.01
    assert made.origins == {
        "optim.lr": "two.yaml of study rates, run run-1",
        "optim.momentum": "one.yaml of study rates, run run-1",
        "train.steps": COMMAND_LINE,
    }
    assert made.told()["optim.lr"] == "0.02 from two.yaml of study rates, run run-1"
    assert not configured("demo-llama", [], ["optim.lr=1"]).origins and not configured("demo-llama", [], []).tags


def test_stages_take_the_place_of_those_that_were_there(tmp_path):
    before = configured("moonlight-demo", [found(tmp_path, train__stages=STAGES)], []).config
    assert [stage.name for stage in before.train.stages] == ["a", "b"] and before.train.stages[1].global_batch == 32
    changed = configured("moonlight-demo", [found(tmp_path, train__stages=STAGES)], ["train.stages.0.steps=5"])
    assert changed.config.train.stages[0].steps == 5 and changed.config.train.stages[1].steps == 20
    assert changed.origins["train.stages"].endswith("changed by the command line")


def test_a_config_that_is_put_down_keeps_where_its_values_come_from(tmp_path):
    made = configured("demo-llama", [found(tmp_path, optim__lr=0.02, optim__momentum=0.9)], ["optim.momentum=0.8"])
    (tmp_path / "config.yaml").write_text(made.yaml())
    again = configured(str(tmp_path / "config.yaml"), [], [])
    assert again == made, "as a job finds it that a cluster starts"
    assert load(str(tmp_path / "config.yaml"), []) == made.config
    assert load_values(read(str(tmp_path / "config.yaml")), [], "c") == made.config
    later = configured(str(tmp_path / "config.yaml"), [], ["optim.lr=0.03"])
    assert later.origins["optim.lr"] == COMMAND_LINE and later.config.optim.lr == 0.03
    plain = configured("demo-llama", [], [])
    assert "from:" not in plain.yaml() and load_values(yaml.safe_load(plain.yaml()), [], "c") == plain.config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 0.1}", "is no settings file: it has no section from that names the study"),
        ("optim: {lr: 0.1}\nfrom: {run: x}", "is no settings file"),
        ("optim: {lr: 0.1}\nfrom: x", "is no settings file"),
        ("from: {study: s}", "has no key of a config beside the section from"),
        ("optim: {lrr: 0.1}\nfrom: {study: s}", r"optim.lrr: no such key of a config; did you mean optim.lr"),
        ("- 1", "must hold keys and values"),
        ("a: [", "cannot be read as YAML"),
        ("optim: {lr: 5}\nfrom: {study: s}", r"demo-llama with \S+s.yaml: 1 problem.*optim.lr must be .* not 5"),
        ("optim: {lr: fast}\nfrom: {study: s}", r"optim.lr: must be a number, not 'fast'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_message(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        configured("demo-llama", [str(tmp_path / "s.yaml")], [])


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"--with \S+gone.yaml: no such file"):
        configured("demo-llama", [str(tmp_path / "gone.yaml")], [])


def with_width(tmp_path, rule, base, width, **settings) -> str:
    """Return a settings file of settings that were found at a width."""
    file = found(tmp_path, **settings or {"optim__lr": 0.02})
    values = yaml.safe_load((tmp_path / "settings.yaml").read_text())
    values["from"]["found_at"] = {"optim.width_rule": rule, "optim.base_width": base, "model.hidden_size": width}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    return file


def test_the_width_at_which_settings_were_found_is_in_their_file(tmp_path):
    config = load("demo-llama", [])
    file = found(tmp_path, conditions=conditions_of(config, [{"optim.lr": 1}]), optim__lr=0.1)
    known = read_settings(file).found_at
    assert known["model.hidden_size"] == 128 and known["optim.name"] == "muon"
    assert "model.hidden_size" not in conditions_of(config, [{}, {"model.hidden_size": 64}]), "nobody knows of which"
    made = {"optim.lr": Setting(value=0.1, why=""), "optim.name": Setting(value="adamw", why="")}
    answer = Answer(headline="h", facts={}, settings=made, found_at={"model.hidden_size": 96})
    (tmp_path / "s.yaml").write_text(settings_yaml(STUDY, answer, "", conditions_of(config, [])))
    known = read_settings(str(tmp_path / "s.yaml")).found_at
    assert known["model.hidden_size"] == 96 and known["optim.name"] == "adamw"


def test_a_rate_found_with_another_optimizer_is_refused(tmp_path):
    file = found(tmp_path, conditions={"optim.name": "muon"}, optim__lr=0.02)
    with pytest.raises(
        ConfigError, match=r"optim.lr was found with optim.name=muon, and this config has optim.name=adamw"
    ):
        configured("demo-llama", [file], ["optim.name=adamw"])
    assert configured("demo-llama", [file], ["optim.name=adamw", "optim.lr=0.1"]).config.optim.lr == 0.1
    assert configured("demo-llama", [file], []).config.optim.lr == 0.02


def test_a_rate_found_at_another_width_without_a_rule_is_a_warning(tmp_path):
    (warning,) = configured("demo-llama", [with_width(tmp_path, "none", 0, 64)], []).warnings
    assert "optim.lr was found at model.hidden_size=64 and without a rule of widths; at 128" in warning
    assert not configured("demo-llama", [with_width(tmp_path, "none", 0, 128)], []).warnings
    assert not configured("demo-llama", [with_width(tmp_path, "none", 0, 64)], ["optim.lr=0.1"]).warnings
    assert not configured("demo-llama", [with_width(tmp_path, "none", 0, 64, train__steps=5)], []).warnings


def test_a_rate_found_with_a_rule_at_another_base_is_refused(tmp_path):
    file = with_width(tmp_path, "spectral", 64, 32)
    with pytest.raises(ConfigError) as refused:
        configured("demo-llama", [file], [])
    assert "optim.lr was found at a width of 64 with optim.width_rule=spectral" in str(refused.value)
    assert "take optim.base_width=64 optim.width_rule=spectral, or set optim.lr on the command line" in str(
        refused.value
    )
    assert configured("demo-llama", [file], ["optim.lr=0.1"]).config.optim.lr == 0.1


def test_commands_take_settings_files(tmp_path):
    file = found(tmp_path, optim__lr=0.02, train__steps=5)
    shown = CliRunner().invoke(app, ["config", "demo-llama", "--with", file, "train.steps=6"])
    assert shown.exit_code == 0 and flatten(yaml.safe_load(shown.output))["optim.lr"] == 0.02
    assert "  # From settings.yaml of study rates, run run-1.\n  lr: 0.02\n" in shown.output
    assert "  # From command line.\n  steps: 6\n" in shown.output
    (tmp_path / "shown.yaml").write_text(shown.output)
    assert load(str(tmp_path / "shown.yaml"), []) == configured("demo-llama", [file], ["train.steps=6"]).config
    planned = CliRunner().invoke(app, ["plan", "demo-llama", "--with", file, "--gpu-type", "H100", "--json"])
    assert json.loads(planned.output)["settings"]["optim.lr"] == "0.02 from settings.yaml of study rates, run run-1"
    planned = CliRunner().invoke(app, ["plan", "demo-llama", "--with", file, "--gpu-type", "H100"])
    assert "0.02 from settings.yaml of study rates, run run-1" in planned.output


def test_numbers_of_numpys_are_written_as_any_others(tmp_path):
    file = found(tmp_path, optim__lr=np.float64(0.01), train__steps=np.int64(7))
    made = configured("demo-llama", [file], []).config
    assert (made.optim.lr, made.train.steps) == (0.01, 7) and "numpy" not in (tmp_path / "settings.yaml").read_text()


def test_values_and_intervals_are_told_shortly():
    assert value_of(Setting(value=0.016, why="")) == "0.016" and value_of(Setting(value="muon", why="")) == "muon"
    assert interval_of(Setting(value=1, why="")) == "-"
    assert interval_of(Setting(value=1, low=0.0123456, high=2.0, why="")) == "0.0123 to 2"
    assert interval_of(Setting(value=1, low=0.5, why="")) == "0.5 to "


def test_every_key_of_a_config_can_be_set_by_a_file(tmp_path):
    """Whatever its type is, it comes out as it was."""
    config = load("demo", [])
    keys = {key: value for key, value in flatten(asdict(config)).items() if value is not None}
    made = {key: Setting(value=value, why="") for key, value in keys.items()}
    (tmp_path / "all.yaml").write_text(settings_yaml(STUDY, Answer(headline="h", facts={}, settings=made), ""))
    assert configured("demo", [str(tmp_path / "all.yaml")], []).config == config
