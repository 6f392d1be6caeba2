"""What counts as one request to stop, and what each of them leads to."""

import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from orchestrator.stop import StopSignal
from workers.common.errors import Interrupted


@pytest.mark.parametrize(
    ("at", "requests"),
    [([0.0], 1), ([0.0, 0.0], 1), ([0.0, 0.49], 1), ([0.0, 0.51], 2), ([0.0, 0.3, 0.6], 2), ([0.0, 0.3, 0.4], 1)],
)
def test_signals_within_half_a_second_are_one(at, requests):
    times = iter(at)
    stop = StopSignal(clock=lambda: next(times))
    with stop.during_training():
        for _ in at:
            stop._hear()
    assert stop.requests == requests


def test_the_first_ends_what_has_no_step_and_the_second_a_training():
    stop = StopSignal(lambda run_id: f"go on with {run_id}")
    stop.check()
    stop.request()
    with stop.during_training():
        stop.check()
        stop.request()
        stop.run_id = "abc"
        with pytest.raises(Interrupted, match="the last checkpoint holds is kept; go on with abc$"):
            stop.check()
    with pytest.raises(Interrupted, match="^interrupted; go on with abc$"):
        stop.check()


WAITS = """
import sys, time
from orchestrator import stop as module
from orchestrator.stop import StopSignal
module.ONE_S = 0.05
stop = StopSignal(lambda run_id: "begin again")
stop.listen({outlive})
print("up", flush=True)
while not stop.requests:
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGPIPE"])
@pytest.mark.parametrize("outlive", [True, False])
def test_what_each_signal_means(name, outlive):
    """Two ask for an end, and end a process that does not react."""
    asks = name in ("SIGINT", "SIGTERM", "SIGQUIT") or (name == "SIGHUP" and not outlive)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WAITS.format(outlive=outlive)], **pipes) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.Signals[name])
        if not asks:
            process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        assert process.stderr.read() == "raymuon: ended at once; begin again\n"


def test_what_cannot_check_is_ended_by_the_first_signal():
    stop = StopSignal(lambda run_id: "begin again")
    with pytest.raises(Interrupted, match="^interrupted; begin again$"), stop.abruptly():
        stop._hear()
        raise AssertionError("it goes on")
    late = StopSignal()
    with pytest.raises(Interrupted), late.abruptly(), suppress(BaseException):  # As some imports do.
        late._hear()
    quiet = StopSignal()
    with quiet.abruptly():
        pass
    quiet._hear()
    assert quiet.requests == 1
