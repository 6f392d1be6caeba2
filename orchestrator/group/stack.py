"""What a process is doing, as far as it can be made to tell: evidence of one that hangs, before it is killed."""

import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from workers.member import STACK_FILE

STACK_S = 0.3
"""How long a worker that is made to show its stack may take."""


def doings(process: psutil.Process) -> str:
    """Return a worker's state and stack.

    It has registered SIGUSR1 with faulthandler, whose handler needs neither the interpreter nor its lock; a stopped
    process is woken for as long as that takes.

    Raises:
        psutil.Error: it is gone.
    """
    told = f"state: {process.status()}, processor time: {sum(process.cpu_times()[:2]):.1f} s\n"
    path = Path(f"/proc/{process.pid}/fd")
    with suppress(OSError):
        stacks = [fd for fd in path.iterdir() if STACK_FILE in str(fd.readlink())]
        if not stacks:
            return told
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + STACK_S
        while time.monotonic() < deadline and not stacks[0].stat().st_size:
            time.sleep(0.01)
        time.sleep(0.05)
        told += stacks[0].read_text(errors="replace")
    return told
