"""Warm Pythons: processes that are forked from one which has imported torch, DeepSpeed and MLflow already.

A process of a run imports for seconds and trains for one. What is started with the environment that is yielded here is
the same command in a process that is as new, but has those imports behind it. Each imports our own code anew, and Ray,
which reads its settings from the environment then. Whoever starts it sees nothing of that: a small process stands in
its place, hands signals on and ends as it does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
VARIABLE, COLD = "RAYMUON_TESTS_WARM", "RAYMUON_TESTS_COLD"
"""Where the server is, if it is to be asked; and the name of a script that is left alone."""


@contextmanager
def warm_pythons(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment in which `raymuon`, the drivers of jobs and Ray's workers are warm; `folder` is for it."""
    path = os.pathsep.join(filter(None, (str(HERE / "path"), os.environ.get("PYTHONPATH", ""))))
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), str(folder)], stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    while not (folder / "socket").exists():
        assert server.poll() is None, (folder / "server.log").read_text()
        time.sleep(0.02)
    try:
        yield {"PYTHONPATH": path, VARIABLE: str(folder)}
    finally:
        server.communicate()  # It ends, with all that it has forked, when nobody holds its input any more.


def real(process: int, folder: Path) -> int:
    """Return the warm process for which another one stands, or that one itself where there is none."""
    told = folder / str(process)
    return int(told.read_text()) if told.exists() else process
