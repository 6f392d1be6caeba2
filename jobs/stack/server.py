"""One way to start a server: at a port that it finds free itself, or at another one where somebody was faster."""

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil

from workers.common.errors import StorageError

START_S = 300.0
END_S = 10.0
"""How long a server may take to end that was asked to."""
LOOK_S = 0.05
TAKEN = "address already in use"

T = TypeVar("T")


@contextmanager
def server(
    name: str,
    starts: Iterable[tuple[list[str], Callable[[list[int]], T]]],
    log: Path,
    environment: Mapping[str, str] | None = None,
    gently: bool = False,
) -> Iterator[T]:
    """Run a server until the block ends, and yield where it is once it answers.

    Args:
        name: for errors.
        starts: commands, each the same with other ports, tried in turn where a port is taken; and what asks the server
            that listens on the given ports, and returns where it is or raises as long as it does not answer.
        log: file for what it says.
        environment: None for this process's own.
        gently: ask it to end before it is killed.

    Raises:
        StorageError: it does not come up.
    """
    for command, ask in starts:
        with log.open("w") as output:
            # A session of its own: a Ctrl-C at our terminal is ours, and it ends after those who use it.
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            if (found := _await(process, ask)) is not None:
                yield found
                return
        finally:
            _end(process, gently)
        if TAKEN not in log.read_text(errors="replace").lower():
            break
    raise StorageError(f"{name} did not come up:\n{log.read_text(errors='replace')[-3000:]}")


def _await(process: "subprocess.Popen[bytes]", ask: Callable[[list[int]], T]) -> T | None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        # Refused connections first, then errors of a server that is half up. Only ports of its own count: whoever has
        # taken one of them would answer as well.
        with suppress(Exception):
            if ports := _ports(process.pid):
                return ask(ports)
        time.sleep(LOOK_S)
    return None


def _ports(pid: int) -> list[int]:
    """Return the TCP ports on which a process, or one that it has started, listens."""
    processes = [psutil.Process(pid)]
    processes += processes[0].children(recursive=True)
    found = [one for process in processes for one in process.net_connections("tcp")]
    return [one.laddr.port for one in found if one.status == psutil.CONN_LISTEN]


def _end(process: "subprocess.Popen[bytes]", gently: bool) -> None:
    """End a server with all that it has started."""
    family = [process]
    with suppress(psutil.Error):
        family += psutil.Process(process.pid).children(recursive=True)
    if gently:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
    for one in family:
        with suppress(psutil.Error):
            one.kill()
    process.wait(END_S)
