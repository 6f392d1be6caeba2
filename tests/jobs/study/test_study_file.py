"""Study files: what they may say, and that everything else is refused before anything runs."""

import re
from dataclasses import replace

import pytest
import yaml

from jobs.study.command import Request, run
from jobs.study.file import StudyFile, config_of, configs_of, load_study, refuse
from jobs.study.question import Branch, Study, Trial
from orchestrator.stop import StopSignal
from tests.jobs.study.questions import Branching
from workers.common.errors import ConfigError

STUDY = {
    "name": "rates",
    "base": "demo-llama",
    "settings": {"train.steps": 20, "optim.weight_decay": 0.0},
    "axes": {"optim.lr": [1e-2, 2e-2], "size": {"64": {"model.hidden_size": 64}, "128": {}}},
    "seeds": [0, 1],
    "question": {"name": "ablation"},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(**changes) -> str:
        values = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "study.yaml")

    return make


def refused(source: str, *overrides: str, **changes) -> str:
    """Return why a study is refused, with nothing made."""
    with pytest.raises(ConfigError) as raised:
        run(Request(source=source, overrides=overrides, **changes), StopSignal(), as_json=False)
    return str(raised.value)


def test_a_study_is_what_its_file_says(write):
    found = load_study(write(), ["train.steps=30", "optim.momentum=1e-1"], "other")
    study = found.study
    assert (study.name, study.base, study.seeds, study.question.name) == ("other", "demo-llama", (0, 1), "ablation")
    assert study.settings == {"train.steps": 30, "optim.weight_decay": 0.0, "optim.momentum": 0.1}
    configs, problems = configs_of(found, study.question.trials(study, {}), {"tracking.uri": "sqlite:///here.db"}, {})
    assert len(configs) == 8 and not problems
    config = configs["optim.lr=0.01,seed=1,size=64"]
    assert (config.seed, config.optim.lr, config.model.hidden_size, config.train.steps) == (1, 1e-2, 64, 30)
    assert config.run.name == "other/optim.lr=0.01,seed=1,size=64" and config.tracking.uri.endswith("/here.db")
    assert config.scaling.max_workers == config.scaling.min_workers == 1, "demo-llama says 2"


def test_a_study_says_itself_how_many_workers_may_come(write):
    found = load_study(write(settings={"scaling.max_workers": 3}))
    assert found.config(found.study.question.trials(found.study, {})[0], {}).scaling.max_workers == 3


def test_a_study_survives_its_own_yaml(write, tmp_path):
    found = load_study(write(axes={"variant": {"base": {}, "weights": {"train.stages": [{"name": "a", "steps": 3}]}}}))
    (tmp_path / "again.yaml").write_text(found.yaml())
    assert load_study(str(tmp_path / "again.yaml")).study == found.study


def test_a_base_lies_beside_its_study(write, tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("train: {steps: 7}\nmodel: {name: llama}")
    found = load_study(write(base="base.yaml", settings={}, axes={"optim.lr": [1e-3, 2e-3]}))
    monkeypatch.chdir("/")
    trial = found.study.question.trials(found.study, {})[0]
    assert config_of(found.study, trial) == found.config(trial, {}) and found.config(trial, {}).train.steps == 7


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"axes": {}}, "axes"),
        ({"axes": {"optim.lrr": [1, 2]}}, "axes.optim.lrr: no such key of a config; did you mean optim.lr?"),
        ({"axes": {"v": {"a": {"optim.momentun": 0.9}}}}, "axes.v.a.optim.momentun: no such key.*optim.momentum?"),
        ({"axes": {"optim.lr": []}}, "axes.optim.lr: has no value"),
        ({"axes": {"optim.lr": 3}}, "axes.optim.lr: is a list of values, or points by name"),
        ({"settings": {"train.step": 3}}, "settings.train.step: no such key.*train.steps"),
        ({"base": "demo-lama"}, "demo-lama: no such config"),
        ({"axis": {}}, "axis: unknown key; did you mean axes?"),
        ({"question": {"name": "ablatoin"}}, "question.name: must be one of ablation.*not 'ablatoin'"),
        ({"question": {"name": "ablation", "metric": 3}}, "question.metric: unknown key"),
        ({"question": None}, "question: is missing"),
        ({"seeds": [0, 0]}, "two trials have one name.*optim.lr=0.01,seed=0,size=64"),
        ({"seeds": []}, "seeds: has none"),
        ({"seeds": ["one"]}, "seeds: must be whole numbers in a list"),
        ({"axes": {"optim.lr": [0.0100000001, 0.01]}}, "axes.optim.lr: 2 values have 1 labels.* 0.01"),
        ({"axes": {"optim.lr": [1e-2, 2.0]}}, r"optim.lr=2,seed=0 and 1 more: optim.lr must be between"),
        ({"axes": {"model.num_experts": [4, 8]}}, "model.num_experts: unknown key where model.name=llama"),
        ({"name": 'a "b"'}, "double quote"),
        ({"early_stop": "maybe"}, "early_stop: must be one of none, diverged, not 'maybe'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(write, tmp_path, changes, told):
    text = refused(write(**changes))
    assert re.search(told, text, re.DOTALL), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.yaml"]


def test_all_is_told_at_once(write):
    text = refused(write(settings={"train.stepz": 3}, axes={"optim.lrr": [1], "model.hiden_size": [2]}))
    assert "3 problem(s)" in text and all(key in text for key in ("stepz", "lrr", "hiden_size"))


def test_a_file_that_is_not_there_is_told_with_those_that_are():
    assert "no such study; give a YAML file or one that is shipped" in refused("nothing")
    assert "--at-once" not in refused("nothing")


def problems_of(question: Branching, steps: int = 10) -> dict[str, str]:
    study = Study(name="s", base="demo-llama", settings={"train.steps": steps}, question=question)  # type: ignore
    from jobs.load import read

    return configs_of(StudyFile(study, read("demo-llama")), question.trials(study, {}), {}, {})[1]


def test_a_branch_from_a_step_that_is_nowhere_is_refused():
    assert problems_of(Branching(steps=(4, 9))) == {}
    assert problems_of(Branching(steps=(4, 11))) == {
        "from-11": "branches from step 11 of long, which has steps 1 to 10"
    }
    assert problems_of(Branching(steps=(0,))) == {"from-0": "branches from step 0 of long, which has steps 1 to 10"}
    assert "no step is its own" in problems_of(Branching(steps=(10,)))["from-10"]
    assert problems_of(Branching(parent="short")) == {"from-4": "branches from short@4, and no trial has that name"}
    cut = Branching(parent="cut", stop_at=3)
    assert problems_of(cut) == {"from-4": "branches from step 4 of cut, which has steps 1 to 3"}
    assert problems_of(Branching(stop_at=11)) == {"cut": "ends at step 11, and its schedule has 10"}


def test_what_is_wrong_with_several_trials_is_told_once():
    study = Study(name="s", question=Branching())  # type: ignore
    with pytest.raises(ConfigError) as raised:
        refuse(study, {"a": "bad", "b": "bad", "c": "worse"})
    assert str(raised.value) == "study s: 2 problem(s) with its trials\n  a and 1 more: bad\n  c: worse"
    refuse(study, {})


def test_a_trials_own_settings_win_over_the_studys():
    study = Study(name="s", base="demo-llama", settings={"optim.lr": 0.5}, question=Branching())  # type: ignore
    trial = Trial(name="t", settings={"optim.lr": 0.25}, coordinates={}, seed=3)
    assert config_of(study, trial).optim.lr == 0.25 and config_of(study, trial).seed == 3
    assert config_of(study, replace(trial, settings={})).optim.lr == 0.5
    assert replace(trial, branch=Branch(trial="a", step=1)).branch
