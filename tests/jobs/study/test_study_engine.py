"""The engine with real runs, workers, storage and MLflow, on plain processes in the place of Ray."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.load import read
from jobs.screen import Screen
from jobs.study.command import _check_done, find_or_make
from jobs.study.engine import Data, Engine
from jobs.study.file import StudyFile
from jobs.study.progress import Account
from jobs.study.question import Outcome, Study
from jobs.study.questions.ablation import Ablation
from jobs.study.record import StudyRecord, stored_study
from jobs.study.state import StudyState
from jobs.study.trial import TrialWatcher
from orchestrator.config import TrackingConfig
from orchestrator.record.tracking import Tracking
from orchestrator.stop import StopSignal
from tests.jobs.study.questions import Branching, Narrowing
from tests.processes import ProcessCluster
from tests.workers.test_loop import TEXT
from workers.common.errors import ConfigError, Interrupted, StorageError
from workers.reports import Report

STEPS = 24
BASE = {
    "model": {"name": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    | {"intermediate_size": 48, "init_std": 0.1},
    "data": {"source": str(TEXT), "held_out_fraction": 0.2},
    "optim": {"lr": 1e-2, "eps": 1e-3, "grad_clip": 1.0},
    "train": {"steps": STEPS, "global_batch": 4, "seq_len": 32, "validate_every": 12}
    | {"validate_sequences": 4, "sample_prompt": "", "micro_batch": 2, "recompute": "none", "logits": "whole"}
    | {"gradients": "whole", "accumulate": "weights"},
    "scaling": {"settle_s": 0.0},
    "telemetry": {"every": 6},
    "checkpoint": {"every": 8, "snapshot_every": 1},
}


class Processes:
    """A joined cluster, each of whose runs has a node of its own."""

    def slots(self, scaling: Any) -> ProcessCluster:
        return ProcessCluster({"a": scaling.max_workers})


@dataclass
class Shown:
    """A display that keeps what it is told."""

    said: list[str] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)

    def show(self, now: Account, running: list[TrialWatcher]) -> None:
        self.accounts.append(now)

    def say(self, text: str) -> None:
        self.said.append(text)


@dataclass
class Led:
    """A study after an attempt at it."""

    state: StudyState
    engine: Engine
    shown: Shown
    stop: StopSignal

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """As MLflow has them."""
        return self.state.record.outcomes()


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A database with its tables."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    Tracking(TrackingConfig(uri=f"sqlite:///{path}"))
    return path


@pytest.fixture(scope="module")
def lead(database):
    """Return what makes an attempt at a study, in the folder of its name."""

    def make(folder: Path, study: Study, at_once: int = 2, again: bool = False) -> Led:
        folder.mkdir(exist_ok=True)
        base = {**BASE, "checkpoint": {**BASE["checkpoint"], "url": f"{folder}/runs"}}
        base["data"] = {**BASE["data"], "prepared_url": f"{database.parent}/data"}
        base["tracking"] = {"uri": f"sqlite:///{folder}/mlflow.db"}
        (folder / "base.yaml").write_text(yaml.safe_dump(base))
        study = replace(study, base=str(folder / "base.yaml"))
        if not (folder / "mlflow.db").exists():
            (folder / "mlflow.db").write_bytes(database.read_bytes())
        tracking = Tracking(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"))
        found = StudyFile(study, read(study.base))
        record = StudyRecord.find(tracking, study.name) or StudyRecord.create(tracking, found)
        state = StudyState(found, record, {})
        state.go_on(again)
        display, stop = Shown(), StopSignal()
        engine = Engine(state, Data(None, Screen(quiet=True)), Processes(), at_once, stop, display, lambda: None)
        led = Led(state, engine, display, stop)
        led_now.append(led)
        engine.run()
        return led

    led_now: list[Led] = []
    make.now = led_now  # type: ignore[attr-defined]
    return make


RATES = Study(name="rates", axes={"optim.lr": [1e-2, 3e-3]}, seeds=(0,), question=Narrowing())  # type: ignore


def assert_each_step_once(outcome: Outcome, first: int = 1, last: int = STEPS) -> None:
    assert [step for step, _ in outcome.losses] == [*range(first, last + 1)]


def figures(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    return {name: (one.losses, one.validation, one.val_loss, one.tokens) for name, one in outcomes.items()}


@pytest.fixture(scope="module")
def unbroken(lead, tmp_path_factory) -> Led:
    return lead(tmp_path_factory.mktemp("unbroken"), RATES)


def test_a_study_trains_what_it_asks_for_and_asks_again(unbroken):
    names = ["optim.lr=0.003,seed=0", "optim.lr=0.005,seed=0", "optim.lr=0.01,seed=0", "optim.lr=0.02,seed=0"]
    assert sorted(unbroken.outcomes) == names, "the best of the first is 0.01, and then half and twice of it"
    for outcome in unbroken.outcomes.values():
        assert_each_step_once(outcome)
        assert outcome.status == "finished" and outcome.steps == STEPS and outcome.tokens == STEPS * 4 * 32
        assert outcome.val_loss == dict(outcome.validation)[STEPS] < dict(outcome.validation)[0]
        assert outcome.seconds > 0 and outcome.coordinates["seed"] == 0
        assert outcome.noise_scale is not None and outcome.noise_scale > 0, "of steps with two micro-batches"
    last = unbroken.shown.accounts[-1]
    assert (last.finished, last.left, last.running) == (4, 0, 0) and last.flops == last.expected_flops
    assert max(account.running for account in unbroken.shown.accounts) == 2
    assert unbroken.state.done == unbroken.outcomes, "what the engine knows is what MLflow has"


def test_the_cost_of_a_trial_is_counted(unbroken):
    outcome = unbroken.outcomes["optim.lr=0.01,seed=0"]
    hidden, inner, heads, head_dim = 32, 48, 2, 16
    matrices = hidden * head_dim * (heads + 1 + 1 + heads) + 3 * hidden * inner
    assert outcome.parameters == matrices + 3 * hidden, "all but embedding and head; two norms in the layer, one behind"
    per_token = 6 * (matrices + 256 * hidden + heads * 2 * head_dim * 32 / 2)
    assert outcome.flops == pytest.approx(per_token * outcome.tokens)
    assert 0 < outcome.optimizer_flops < outcome.flops


def test_runs_are_nested_and_named(unbroken):
    client, parent = unbroken.state.record.tracking.client, unbroken.state.record.run_id
    for begun in unbroken.state.record.begun().values():
        run = client.get_run(begun.run_id)
        assert run.data.tags["mlflow.parentRunId"] == parent and run.info.run_name == f"rates/{begun.name}"
        assert json.loads(run.data.tags["raymuon.study.coordinates"])["optim.lr"] == float(run.data.params["optim.lr"])
        assert run.info.status == "FINISHED"


def test_two_processes_that_begin_a_study_get_one_run(unbroken):
    record, found = unbroken.state.record, unbroken.state.found
    assert StudyRecord.create(record.tracking, found).run_id == record.run_id
    with record.tracking.reach():
        runs = record.tracking.client.search_runs([record.tracking.experiment_id])
    assert sum("mlflow.parentRunId" not in run.data.tags for run in runs) == 1


def test_a_study_begins_with_a_run_that_is_named(lead, unbroken):
    done = next(one for one in unbroken.outcomes.values() if one.status == "finished")
    begins = {"train.init": f"{done.run_id}@{STEPS}"}
    study = replace(RATES, name="tuned", axes={"optim.lr": [1e-3, 2e-3]}, settings={**RATES.settings, **begins})
    tuned = lead(Path(unbroken.state.found.study.base).parent, study)
    first = min(one.validation for one in tuned.outcomes.values())[0]
    assert first == (0, pytest.approx(done.val_loss, abs=1e-6)), "the weights are those of the run's end"
    assert {config.train.init for config in tuned.state.configs.values()} == {begins["train.init"]}


def test_a_checkpoint_that_is_nowhere_is_told_before_a_study_has_a_run(unbroken):
    state = unbroken.state
    config = next(iter(state.configs.values()))
    config = replace(config, train=replace(config.train, init="nowhere@7"))
    found = replace(state.found, study=replace(state.found.study, name="new"))
    with pytest.raises(ConfigError, match="train.init=nowhere: there is no such folder, and as a run"):
        find_or_make(found, state.record.tracking, [config])
    assert StudyRecord.find(state.record.tracking, "new") is None


def test_outcomes_come_in_pages(unbroken, monkeypatch):
    before = unbroken.outcomes
    monkeypatch.setattr("jobs.study.record.PAGE", 1)
    assert unbroken.outcomes == before and len(before) == 4


@pytest.fixture
def interrupt(lead, monkeypatch):
    """Return what has the next attempt see requests to stop when a trial comes to a step."""
    report = TrialWatcher.report

    def at(number: int, requests: int) -> None:
        def reported(self: TrialWatcher, told: Report) -> None:
            report(self, told)
            if self.step == number:
                lead.now[-1].stop.requests = self.stop.requests = requests

        monkeypatch.setattr(TrialWatcher, "report", reported)

    yield at
    monkeypatch.undo()


def test_a_study_that_is_stopped_goes_on_and_comes_to_the_same(lead, unbroken, interrupt, monkeypatch, tmp_path):
    """Ctrl-C in the middle of a trial: all save; then nothing is lost and nothing repeated."""
    interrupt(10, 1)
    first = lead(tmp_path / "broken", RATES)
    before, left = first.state.record.begun(), len(first.state.left)
    assert any(10 <= one.step < STEPS and one.saved == one.step for one in before.values()), "in the middle, and saved"
    with pytest.raises(Interrupted, match=rf"done and {left} left"):
        _check_done(first.state, first.engine, first.stop)
    interrupt(STEPS + 1, 1)
    again = lead(tmp_path / "broken", RATES)
    assert any("goes on behind step" in text for text in again.shown.said)
    assert figures(again.outcomes) == figures(unbroken.outcomes), "bit by bit"
    now = again.state.record.begun()
    assert len(now) == len(unbroken.outcomes) and all(now[name].run_id == one.run_id for name, one in before.items())
    nothing = lead(tmp_path / "broken", RATES)
    assert not any("begins" in text for text in nothing.shown.said), "a study that is done trains nothing"


def test_a_second_request_ends_at_once(lead, interrupt, tmp_path):
    interrupt(3, 2)
    with pytest.raises(Interrupted, match="ended at once"):
        lead(tmp_path / "at-once", replace(RATES, axes={"optim.lr": [1e-2]}))
    assert not any(thread.name.startswith("trial") for thread in threading.enumerate())
    interrupt(STEPS + 1, 1)
    assert not lead(tmp_path / "at-once", replace(RATES, axes={"optim.lr": [1e-2]})).state.left


def test_a_study_that_is_another_now_is_refused(lead, unbroken):
    folder = Path(unbroken.state.found.study.base).parent
    with pytest.raises(ConfigError) as raised:
        lead(folder, replace(RATES, settings={"optim.momentum": 0.5}))
    assert "optim.lr=0.01,seed=0: optim.momentum: it has begun with 0.95, the study has 0.5" in str(raised.value)
    with pytest.raises(ConfigError, match=r"optim.lr=0.003,seed=0 \(run \w+\): is not asked for any more"):
        lead(folder, replace(RATES, axes={"optim.lr": [1e-2]}))
    assert figures(lead(folder, RATES).outcomes) == figures(unbroken.outcomes), "nothing has become of that"


def test_seeds_may_come(lead, tmp_path):
    one = Study(name="seeds", axes={"optim.lr": [1e-2, 5e-3]}, question=Ablation())  # type: ignore
    first = lead(tmp_path / "more", one).outcomes
    more = lead(tmp_path / "more", replace(one, seeds=(0, 1))).outcomes
    assert (len(first), len(more)) == (2, 4) and first.items() <= more.items()


def test_what_fails_is_an_answer_and_what_the_place_does_leaves_a_trial_open(lead, tmp_path):
    """A rate with which nothing is learned, a rate that cannot be, and a place that cannot be written."""
    (tmp_path / "file").write_text("")
    study = Study(name="faults", axes={"optim.lr": [0.9, 1e-2]}, question=Narrowing())  # type: ignore
    study = replace(study, settings={"optim.weight_decay": 0.0, "optim.grad_clip": 0.0})
    led = lead(tmp_path / "faults", study)
    failed = led.outcomes["optim.lr=0.9,seed=0"]
    assert failed.status == "failed" and failed.val_loss is None and failed.error.startswith("diverged: after step 6 ")
    assert led.outcomes["optim.lr=0.01,seed=0"].status == "finished"
    assert not any("begins" in text for text in lead(tmp_path / "faults", study).shown.said), "it is not tried again"
    again = lead(tmp_path / "faults", replace(study, early_stop="none"), again=True)
    assert again.outcomes["optim.lr=0.9,seed=0"].steps == STEPS and again.shown.said[0].startswith(
        "optim.lr=0.9,seed=0"
    )
    bad = replace(study, name="bad", axes={"optim.lr": [0.6]}, early_stop="none")
    bad = replace(bad, settings={**study.settings, "train.steps": 2})
    refused = lead(tmp_path / "faults", bad).outcomes["optim.lr=1.2,seed=0"]
    assert refused.status == "failed" and "optim.lr must be between" in refused.error
    places = replace(RATES, name="places", settings={"checkpoint.url": f"{tmp_path}/file/runs"})
    nowhere = lead(tmp_path / "faults", places)
    assert len(nowhere.engine.open) == 2 and not nowhere.outcomes
    with pytest.raises(StorageError, match=r"2 trial\(s\) are not done, 0 are"):
        _check_done(nowhere.state, nowhere.engine, nowhere.stop)


def test_trials_branch_and_are_cut_short(lead, tmp_path):
    question = Branching(steps=(8, 12), stop_at=10)
    led = lead(tmp_path / "branches", Study(name="branches", question=question))  # type: ignore
    done = led.outcomes
    assert_each_step_once(done["long"])
    assert_each_step_once(done["cut"], 1, 10)
    assert_each_step_once(done["from-8"], 9)
    assert_each_step_once(done["from-12"], 13)
    assert done["cut"].losses == done["long"].losses[:10] and done["cut"].val_loss == dict(done["cut"].validation)[10]
    assert done["from-12"].losses[0] == done["long"].losses[12], "the first loss is of the weights that it came with"
    assert done["from-12"].losses[1] != done["long"].losses[13], "and the rate is its own"
    assert all(one.tokens == one.steps * 4 * 32 for one in done.values()), "those of its parent included"
    assert done["from-8"].seconds < done["long"].seconds * 1.5


def test_a_branch_of_what_has_failed_fails(lead, tmp_path):
    study = Study(name="orphans", settings={"optim.lr": 0.9, "optim.grad_clip": 0.0}, question=Branching(steps=(20,)))  # type: ignore
    done = lead(tmp_path / "orphans", replace(study, settings={**study.settings, "optim.weight_decay": 0.0})).outcomes
    assert done["from-20"].error.startswith("long, from which it branches, has failed: diverged")


def test_a_study_is_read_from_its_run_alone(unbroken):
    record = unbroken.state.record
    with stored_study(record.tracking.uri, record.run_id) as stored:
        assert replace(stored.study, base="") == replace(unbroken.state.found.study, base="")
        state = StudyState(stored, record, {})
        state.read()
        assert not state.left and state.done == unbroken.outcomes
        assert state.account(None, 1).finished == 4


@pytest.fixture(autouse=True)
def questions_of_tests(monkeypatch) -> Iterator[None]:
    """Have the loader of study files know the questions of these tests."""
    kinds = {"narrowing": Narrowing, "branching": Branching, "ablation": Ablation}
    monkeypatch.setattr("jobs.study.file._question", lambda name: kinds[name])
    yield
