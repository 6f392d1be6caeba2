"""What a person sees of a run on the terminal."""

from jobs.watch import TerminalWatcher
from orchestrator.record.events import Fault


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
