"""What a person sees of a run on the terminal."""

from jobs.watch import TerminalWatcher
from optim.config import OptimConfig
from orchestrator.record.events import Fault
from workers.recipe import Recipe, StageConfig, TrainConfig
from workers.reports import StepDone


def test_an_error_with_brackets_is_told_as_it_is(capsys):
    cause = "rank 1: [/pytorch/third_party/gloo/transport/tcp/pair.cc:544] [enforce fail] Connection closed"
    with TerminalWatcher() as watcher:
        fault = {"kind": "lost", "cause": cause, "generation": 1, "during_recovery": False, "ranks": (1,)}
        watcher.event(Fault(time=0.0, step=7, began=0.0, **fault))
        watcher.warn(cause)
    assert "".join(capsys.readouterr().err.split()).count(cause.replace(" ", "")) == 2


def test_the_same_warning_one_after_the_other_is_told_once(capsys):
    with TerminalWatcher() as watcher:
        for text in ("gone", "gone", "gone", "slow", "gone"):
            watcher.warn(text)
    assert capsys.readouterr().err.split() == ["gone", "slow", "gone"]


def test_the_speed_is_that_of_the_targets_that_counted_and_the_time_that_of_the_batches_to_come(capsys):
    stages = StageConfig(name="a", steps=6), StageConfig(name="b", steps=5, global_batch=64)
    recipe = Recipe(TrainConfig(stages=stages), OptimConfig())
    with TerminalWatcher() as watcher:
        watcher.begin("run", 0, 11, 1, recipe)
        rest = dict.fromkeys(("lr", "grad_norm", "expert_imbalance", "snapshot_seconds"), 1.0)
        counts = {"tokens": 900, "step_tokens": 500, "skipped": 0, "snapshot_every": 1}
        watcher.report(StepDone(generation=1, rank=0, time=1.0, step=1, loss=2.0, seconds=2.0, **rest, **counts))
    assert "step 1/11  loss 2.0000  250 tokens/s  30 s left" in capsys.readouterr().err
