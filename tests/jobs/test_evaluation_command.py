"""What the command makes of what tasks tell: on record at once, and nothing lost where that fails."""

from dataclasses import dataclass, field, replace

import pytest

from jobs.evaluation.command import Asked, _Seen, evaluate
from jobs.evaluation.work import Deleted, Evaluation, Figure, Result, evaluate_all
from jobs.screen import Screen
from jobs.trained import open_trained, series
from orchestrator.log.run_log import RunLog
from orchestrator.stop import StopSignal
from tests.jobs.test_export import trained
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store


@dataclass
class Away:
    """A record in an MLflow that does not answer so many times."""

    times: int
    values: dict = field(default_factory=dict)

    def add(self, step, at, values) -> dict[str, float]:
        if self.times:
            self.times -= 1
            raise StorageError("tracking.uri=http://away: no server answers there")
        known = {name: self.values[step, name] for name in values if (step, name) in self.values}
        self.values |= {(step, name): value for name, value in values.items() if name not in known}
        return known

    def keep(self, task, step, details) -> None:
        self.kept = (task, step, details)

    def write_table(self) -> None:
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of three steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trained(folder, "llama", steps=(10, 20, 30))
    return folder


def result(one, value: float, shots: int | None = 0) -> Result:
    return Result(one.where, (Figure("t", "acc", value, 0.1, shots, 4),), {"t": {"of": one.step}})


def seen(opened, record, **asked) -> _Seen:
    return _Seen(opened, record, Evaluation(tasks=("t",), **asked), Screen(width=200))


def test_figures_outlive_an_mlflow_that_is_away(run, capsys):
    opened, record = series(str(run), ""), Away(1)
    taken = seen(opened, record)
    for one in (*opened[:2], opened[0]):  # A task that was lost tells what it told before.
        taken.told(result(one, one.step / 100))
    assert record.values == {(20, "t/acc"): 0.2, (20, "t/acc_stderr"): 0.1}
    told = capsys.readouterr().out
    assert "@10: not on record yet" in told and "no server answers" in told and "done, 2 of 3" in told
    assert taken.put_down_rest() is None and record.values[10, "t/acc"] == 0.1
    taken.told(result(opened[2], 0.3))
    record.times, taken.recorded = 9, set()
    assert "no server answers" in str(taken.put_down_rest()), "it is away for good"


def test_a_task_that_comes_to_no_figure_is_told(run, capsys):
    """lm-eval leaves a metric out, without a word, that is known and none of the task's kind."""
    opened = [open_trained(str(run), "")]
    seen(opened, Away(0)).told(replace(result(opened[0], 0.5), silent=("u",)))
    assert "no figure of u" in capsys.readouterr().out


def test_another_value_is_told_and_the_first_one_stays(run, capsys):
    opened, record = series(str(run), "")[:1], Away(0, {(10, "t/acc"): 0.25, (10, "t/acc_stderr"): 0.2})
    seen(opened, record).told(result(opened[0], 0.25 + 1e-9))
    assert "on record" not in capsys.readouterr().out
    seen(opened, record).told(result(opened[0], 0.5))
    assert "step 10: t/acc is 0.5 now and 0.25 on record" in capsys.readouterr().out
    nan = float("nan")
    seen(opened, Away(0, {(10, "t/acc"): nan})).told(result(opened[0], nan))
    assert "on record" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "t"),
        ({"shots": 0}, "t_0shot"),
        ({"shots": 5}, "t"),  # Its own file says none.
        ({"chat": True}, "t_chat"),
        ({"chat": True, "shots": 0}, "t_0shot_chat"),
    ],
)
def test_what_is_asked_otherwise_is_another_figure(run, asked, name):
    opened, record = [open_trained(str(run), "")], Away(0)
    seen(opened, record, **asked).told(result(opened[0], 0.5))
    assert (30, f"{name}/acc") in record.values and record.kept[0] == name


def test_each_system_message_is_another_figure(run):
    opened, record = [open_trained(str(run), "")], Away(0)
    for system in ("", "Be brief.", "Be long."):
        seen(opened, record, chat=True, system=system).told(result(opened[0], 0.5))
    assert len({name for _, name in record.values if name.endswith("/acc")}) == 3


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_left_out(tmp_path):
    trained(tmp_path / "run", "llama", steps=(10, 20), **{"train.seq_len": 48})
    opened = series(str(tmp_path / "run"), "")
    log = RunLog(Store(str(tmp_path / "run")))
    log.take_over({})
    assert log.mark("delete", log.commit_of(10), "retention")
    told, asked = [], Evaluation(tasks=("stdlib_brackets",), limit=1)
    evaluate_all(asked, [one.where for one in opened], lambda note, done: told.append((note, done)))
    kinds = [(type(note), done) for note, done in told if isinstance(note, Deleted | Result)]
    assert kinds == [(Deleted, opened[0].where), (Result, opened[1].where)]
    (tmp_path / "run" / "log").rename(tmp_path / "run" / "elsewhere")
    with pytest.raises(ConfigError, match="no run's folder"):  # Nobody has deleted it: this node does not see it.
        evaluate_all(asked, [opened[0].where], lambda note, done: None)


def test_a_task_that_does_not_fit_the_model_is_told_before_anything_is_computed(tmp_path):
    """Generations come last: hours of likelihoods would be lost."""
    trained(tmp_path / "run", "llama", **{"train.seq_len": 16})
    where, told = open_trained(str(tmp_path / "run"), "").where, []
    with pytest.raises(ConfigError, match="task stdlib_brackets: it asks for up to 16 new tokens, and the model looks"):
        evaluate_all(Evaluation(tasks=("stdlib",)), [where], lambda note, done: told.append(note))
    assert not any(getattr(note, "done", 0) for note in told)


def test_a_system_message_needs_a_chat_and_a_chat_a_template(run):
    asked = {"what": str(run), "tasks": ("stdlib",), "tracking_uri": f"sqlite:///{run}/mlflow.db"}
    with pytest.raises(ConfigError, match="--system is the first message of a conversation: it needs --chat"):
        evaluate(Asked(**asked, system="x"), StopSignal(), False)
    with pytest.raises(ConfigError, match="was not tuned with conversations"):
        evaluate(Asked(**asked, chat=True), StopSignal(), False)


def test_a_lost_task_goes_on_with_what_it_had_not_done():
    from orchestrator.evaluation import BegunAgain, _Board

    board = _Board()
    assert board.begin(["a", "b"]) == ["a", "b"] and board.begin(["c"]) == ["c"] and board.take() == []
    board.put("half of a", "")
    board.put("a", "a")
    assert board.begin(["a", "b"]) == ["b"] and board.take() == ["half of a", "a", BegunAgain(("b",))]
