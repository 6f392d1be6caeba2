"""One GPU in ten minutes: what our kernels and choices gain there, and how far a plan is from it.

Each part runs in a process of its own and has a time limit, so that what hangs or ends its process costs the table its
own rows and no others. Without a GPU everything runs in a tiny form on the CPU, which shows that it works and no more.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from os import environ
from pathlib import Path
from typing import Any

import torch

from jobs.bench.gpu_part import PARTS
from jobs.bench.gpu_rows import one_line
from jobs.bench.process import ALIKE, python
from jobs.screen import Screen
from jobs.table import print_table
from workers.common.errors import ConfigError

WHOLE_S = 570.0
"""For all parts together."""
MOST_S = 120.0
"""For one of them, but for the last."""
LEAST_S = 5.0
"""With less than that none is begun."""
HEAD = ("", "before", "after", "value", "unit", "ratio", "")


def gpu(tiny: bool, only: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the rows.

    Args:
        tiny: small, on the CPU, though there is a GPU.
        only: one part by name; empty for all.
        say: takes a line about each row.

    Raises:
        ConfigError: there is no such part.
    """
    if only and only not in PARTS:
        raise ConfigError(f"--only {only}: must be one of {', '.join(PARTS)}")
    names, tiny = [only] if only else list(PARTS), tiny or not torch.cuda.is_available()
    end, rows, seconds = time.monotonic() + WHOLE_S, [], {}
    calibration = None
    for together in [names] if tiny else [[name] for name in names]:
        begin = time.monotonic()
        left = end - begin
        found, problem = _measure(together, tiny, left if names[-1] in together else min(MOST_S, left))
        new = [one["row"] for one in found if "row" in one]
        if problem:
            name = ", ".join(together)
            new.append({"part": name, "what": f"{name}: what is not here of it", "problem": problem})
        for row in new:
            say("  ".join(filter(None, cells(row))))
        rows += new
        calibration = next((one["calibration"] for one in found if "calibration" in one), calibration)
        seconds[", ".join(together)] = time.monotonic() - begin
    return {
        "device": "CPU, tiny form" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "rows": rows,
        "seconds": seconds,
        "calibration": calibration and json.loads(calibration),
    }


def _measure(names: list[str], tiny: bool, limit: float) -> tuple[list[dict[str, Any]], str]:
    """Run parts in a process; return what it has told, and what was wrong, "" for nothing."""
    if limit < LEAST_S:
        return [], "not begun: the time is over"
    command, problem = python("jobs.bench.gpu_part", "true" if tiny else "false", *names), ""
    with tempfile.TemporaryDirectory(prefix="raymuon-gpu-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with out.open("w") as told, err.open("w") as said:
            try:
                done = subprocess.run(command, env={**environ, **ALIKE}, stdout=told, stderr=said, timeout=limit)
                if done.returncode:
                    last = (err.read_text(errors="replace").strip().splitlines() or [""])[-1]
                    problem = one_line(f"ended with {done.returncode}: {last}")
            except subprocess.TimeoutExpired:
                problem = f"ended after {limit:.0f} s"
        text = out.read_text(errors="replace")
    return list(_told(text)), problem


def _told(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects that a part has told; libraries print, too, and the last line may be half of one."""
    for line in text.splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict):
            yield one


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the table as text: what, before, after, value, unit, ratio, and what else is to be said."""

    def number(key: str) -> str:
        return "" if row.get(key) is None else f"{row[key]:,.4g}"

    figures = (number("before"), number("after"), number("value"), row.get("unit", ""), number("ratio"))
    return (row["what"], *figures, "; ".join(filter(None, (row.get("problem"), row.get("note")))))


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print_table(Screen(), HEAD, [cells(row) for row in result["rows"]], f"{result['device']}, torch {result['torch']}")


def markdown(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *(cells(row) for row in result["rows"])]
    about = f"{result['device']}, torch {result['torch']}"
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"{about}\n\n{body}\n"
