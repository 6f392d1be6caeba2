"""Running the real command for a measurement, and reading what it says."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from workers.common.errors import BY_EXIT_CODE, TrainingError

ALIKE = {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""The environment of a process that computes, as Ray and our actor set it."""
END_S = 60.0
"""For which an interrupted command may finish its step and save."""


def run_json(command: list[str], folder: Path | None = None, /, **environment: str) -> dict[str, Any]:
    """Run a command whose last line on stdout is a JSON object, and return that object.

    Args:
        command: its words.
        folder: in which it runs; None for this process' own.
        environment: what it has beside this process' own, or in its place.

    Raises:
        RaymuonError: it failed; of its exit code, with the end of what it said.
        KeyboardInterrupt: a person has ended this process; the command has ended before.
    """
    environ = {**os.environ, **environment}
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            told, said = process.communicate()
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        error = BY_EXIT_CODE.get(process.returncode, TrainingError)
        words = said.decode(errors="replace")[-2000:]
        raise error(f"{shlex.join(command)} ended with {process.returncode}:\n{words}")
    return json.loads(told.decode().strip().splitlines()[-1])


def _end(process: subprocess.Popen) -> None:
    """Have a command end by itself; it may have heard the same Ctrl-C. What does not end is killed."""
    try:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=END_S)  # Whoever is not read from may not end.
    except BaseException:
        process.kill()
        raise


def torchrun(processes: int, module: str, *arguments: object) -> dict[str, Any]:
    """Run a module as so many ranks on this machine, and return what rank 0 tells by `jobs.tell`.

    Raises:
        TrainingError: it failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return run_json([*command, "-m", module, *map(str, arguments)], **ALIKE)


def python(module: str, *arguments: str) -> list[str]:
    """Return the command line of a module of this very installation."""
    return [sys.executable, "-m", module, *arguments]


def raymuon(*arguments: str) -> list[str]:
    """Return the command line of this very installation's raymuon."""
    return [str(Path(sys.executable).with_name("raymuon")), *arguments]
