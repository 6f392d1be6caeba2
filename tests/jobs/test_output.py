"""Output that is lost: whatever becomes of stdout and stderr, a process goes on."""

import fcntl
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs.submit import watch
from workers.common.errors import StorageError

TALKS = """
import logging, os, sys, threading
from rich.console import Console
from jobs.output import nobody_reads, outlive_output
outlive_output()
logging.basicConfig(stream=sys.stderr)
with open("kept", "w") as kept:
    for number in range(300):
        print("stdout", number, "." * 100)
        Console(stderr=True).print("stderr", number)
        logging.warning("log")
    thread = threading.Thread(target=lambda: print("from a thread"))
    thread.start()
    thread.join()
    sys.stdout.flush()
    kept.write(str(nobody_reads()))
"""


def talk(folder, **streams) -> tuple[int, str]:
    process = subprocess.Popen([sys.executable, "-c", TALKS], cwd=folder, **streams)
    return process.wait(60), (folder / "kept").read_text()


def test_a_pipe_that_nobody_reads(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    assert talk(tmp_path, stdout=writing, stderr=writing) == (0, "True")
    os.close(writing)


def test_a_terminal_that_vanishes(tmp_path):
    ours, theirs = pty.openpty()
    os.close(ours)
    assert talk(tmp_path, stdout=theirs, stderr=theirs) == (0, "True")
    os.close(theirs)


def test_a_disk_that_is_full(tmp_path):
    with Path("/dev/full").open("w") as full:
        assert talk(tmp_path, stdout=full, stderr=full) == (0, "True")


def test_a_result_that_a_full_disk_does_not_take_is_told(tmp_path):
    """And one that nobody wants to read is not."""
    script = "import sys; from jobs.cli import main; sys.argv = ['raymuon', 'plan', 'demo', '--json']; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert done.stderr == "raymuon: stdout: No space left on device; what was written there is not whole\n"
    reading, writing = os.pipe()
    os.close(reading)
    assert subprocess.run([sys.executable, "-c", script], stdout=writing).returncode == 0
    os.close(writing)


@pytest.mark.parametrize("closed", [">&- 2>&-", "2>&-", "<&- >&- 2>&-"])
def test_no_output_at_all(tmp_path, closed):
    done = subprocess.run(["bash", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", TALKS], cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "kept").read_text() == "False", "and nothing was printed into the file that was opened next"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_has_not_every_character(encoding):
    script = "from jobs.output import outlive_output; outlive_output(); print('naïve 日本', '\\udcff')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert done.stdout == "naïve 日本 \udcff\n".encode(encoding, "backslashreplace")


def test_a_pipe_that_does_not_block_loses_nothing(tmp_path):
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETFL, os.O_NONBLOCK)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    read: list[bytes] = []

    def drain() -> None:
        with os.fdopen(reading, "rb") as pipe:
            read.append(pipe.read())

    reader = threading.Thread(target=drain)
    reader.start()
    process = subprocess.Popen([sys.executable, "-c", TALKS], cwd=tmp_path, stdout=writing)
    os.close(writing)
    assert process.wait(60) == 0
    reader.join()
    lines = b"".join(read).decode().splitlines()
    assert lines == [*(f"stdout {number} {'.' * 100}" for number in range(300)), "from a thread"]


class Following:
    """A job that talks twice, and then fails."""

    def __init__(self) -> None:
        self.told = 0

    def follow(self, job: str, write) -> None:
        for _ in range(2):
            self.told += 1
            write("a line\n")

    def info(self, job: str) -> dict:
        return {"status": "FAILED", "exit_code": 5}


@pytest.mark.parametrize(("unread", "told", "ends"), [(False, 1, SystemExit), (True, 2, StorageError)])
def test_a_log_that_nobody_reads_is_not_followed_and_a_submission_ends_as_its_job_does(monkeypatch, unread, told, ends):
    monkeypatch.setattr("jobs.submit.nobody_reads", lambda: True)
    job = Following()
    with pytest.raises(ends) as raised:
        watch(job, "job", "run", unread)
    assert job.told == told and (ends is StorageError or raised.value.code == 0)
