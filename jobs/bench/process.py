"""Running the real command for a measurement, and reading what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from workers.common.errors import TrainingError

ALIKE = {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""The environment of a process that computes, as Ray and our actor set it."""


def run_json(command: list[str], **environment: str) -> dict[str, Any]:
    """Run a command whose last line on stdout is a JSON object, and return that object.

    Raises:
        TrainingError: it failed; with the end of what it said.
    """
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise TrainingError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


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
