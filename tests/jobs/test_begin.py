"""The first half second of a command, and its last: what asks for an end then."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


def begin(*arguments: str, ignored: signal.Signals | None = None) -> subprocess.Popen:
    """Start the command, and return when it imports."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "jobs", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignored and (lambda: signal.signal(ignored, signal.SIG_IGN)),
    )
    assert any("typer" in line for line in process.stderr)
    return process


def end(process: subprocess.Popen) -> tuple[str, str]:
    """Return what it wrote, and leave nothing of it behind."""
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_during_the_imports_ends_the_command_in_a_line(number):
    process = begin("train", "demo")
    process.send_signal(number)
    _, told = end(process)
    said = [line for line in told.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, said) == (130, ["raymuon: interrupted"])


def test_a_signal_that_was_ignored_before_stays_so():
    process = begin("--version", ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    output, _ = end(process)
    assert process.returncode == 0 and output.startswith("raymuon ")


LATE = """
import os, sys, threading, time
from jobs.__main__ import main

class Late:
    def __del__(self, write=os.write):
        write(2, b"taken down")

def later():
    time.sleep(60)

sys.modules["late"] = Late()
sys.argv = ["raymuon", "nowhere"]
main()
"""


def test_the_end_of_a_command_calls_what_is_to_be_called_and_takes_nothing_down():
    called = "import atexit, jobs.cli; jobs.cli.app = lambda **_: atexit.register(os.write, 1, b'called') and 3; main()"
    done = subprocess.run([sys.executable, "-c", LATE.replace("main()", called)], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"called", b"")


def test_a_crash_is_told_with_its_traceback():
    late = LATE.replace("main()", "import jobs.cli; jobs.cli.app = lambda **_: 1 / 0; main()")
    done = subprocess.run([sys.executable, "-c", late], cwd=ROOT, capture_output=True)
    assert done.returncode == 1 and b"ZeroDivisionError" in done.stderr and b"taken down" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_signal_ends_what_python_waits_for_at_the_end(unbuffered):
    """As a thread that is still in the middle of something; what was told before has come out by then."""
    code = LATE.replace('sys.modules["late"] = Late()', "threading.Thread(target=later).start()")
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, env=environment)
    assert b"No such command" in process.stderr.readline()
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, told = end(process)
    assert process.returncode in (2, 130) and b"Traceback" not in told


SWALLOWED = """
import os, signal
import jobs.cli

def command(**_):
    try:
        exec("os.kill(os.getpid(), signal.SIGTERM); import time; time.sleep(9)")
    except KeyboardInterrupt:
        {then}

jobs.cli.app = command
jobs.cli.main()
"""


TOLD = "raymuon: interrupted\n"


@pytest.mark.parametrize(("then", "code", "told"), [("return", 0, ""), ("raise", 130, TOLD), ("return 130", 130, TOLD)])
def test_an_interruption_out_of_an_import_is_no_death_by_a_signal(then, code, told):
    """As of torch's, which make classes by `exec`; and some of which swallow it."""
    script = SWALLOWED.format(then=then)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, told)


def test_the_command_begins_there():
    assert 'raymuon = "jobs.__main__:main"' in (ROOT / "pyproject.toml").read_text()
