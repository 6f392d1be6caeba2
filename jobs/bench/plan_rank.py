"""One rank that trains and measures its machine in turns: what `bench plan` holds the plan against.

Started as `torchrun -m jobs.bench.plan_rank CONFIG.yaml RUN_URL TURNS`. The process is fresh, so its peak is that
of the engine and the first turn's steps. Rank 0 tells the seconds of each turn's steps, the calibration that followed
each turn (all ranks measure at the same time, as they train), the growth of the peak and the bytes of state. With 0
turns nothing is timed: a few steps for the peak alone.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store, rendezvous

from jobs.load import load
from jobs.tell import tell
from orchestrator.config import absolute, task_of
from workers.calibrate import (
    Calibration,
    measure_collectives,
    measure_device,
    processor_seconds,
    processor_share,
)
from workers.controls import Controls, Pause
from workers.data.prepare import prepare
from workers.engine import Engine
from workers.lean import import_compiler
from workers.loop import Trainer
from workers.reports import Report, StepDone
from workers.state import Counters
from workers.task import Place
from workers.training import join

WARMUP_STEPS, LEAST_STEPS, LEAST_SECONDS = 1, 2, 8.0
"""Of a turn."""


def main(config_path: str, run_url: str, turns: int) -> None:
    """Train and measure as one rank of a torchrun group."""
    config = absolute(load(config_path, []))
    store, rank, world_size = next(rendezvous("env://"))
    member = Place(generation=1, rank=rank, world_size=world_size, host="", port=0, keepers=False)
    task = task_of(config, prepare(config.data), run_url, attempt=1, manifest=None)
    import_compiler()  # Recomputed layers do; what a process imports is no part of what it grows.
    before = _memory("VmRSS")
    engine, counters = join(member, task, store), Counters()
    seconds, shares, calibrations, growth = [], [], [], 0
    for turn in range(max(1, turns)):
        watch = Watch(LEAST_SECONDS if turns else 0.0)
        Trainer(task, member, engine, counters, Controls(report=watch.report, pause=watch.pause)).run()
        growth = growth or _memory("VmHWM") - before
        if not turns:
            break
        seconds.append(watch.seconds[WARMUP_STEPS:])
        share = processor_share(watch.marks[WARMUP_STEPS - 1], watch.marks[-1])
        shares.append([float(text) for text in _gather(store, f"share/{turn}", rank, world_size, str(share))])
        found = measure_device(engine.device).with_collectives(measure_collectives(None, engine.device))
        texts = _gather(store, f"calibration/{turn}", rank, world_size, found.to_json())
        ours, *others = (Calibration.from_json(text) for text in texts)
        calibrations.append(ours.with_speed_of(others).to_json())
    grown = [int(text) for text in _gather(store, "growth", rank, world_size, str(growth))]
    if rank == 0:
        tell(
            {
                "seconds": seconds,
                "shares": shares,
                "calibrations": calibrations,
                "growth": max(grown),
                "state": _state_bytes(engine),
            }
        )
    engine.destroy()


class Watch:
    """One turn: the seconds of its steps, on rank 0, and what every rank had of its processor by each step's end."""

    def __init__(self, least_seconds: float) -> None:
        self.least_seconds = least_seconds
        self.began = time.perf_counter()
        self.seconds: list[float] = []
        self.marks: list[tuple[float, float]] = []

    def report(self, kind: type[Report], **fields: Any) -> None:
        """Take a report of the step loop."""
        if kind is StepDone:
            self.seconds.append(fields["seconds"])

    def pause(self) -> Pause:
        """Leave when there are enough steps; one rank's word is everybody's."""
        self.marks.append(processor_seconds())
        enough = len(self.marks) >= WARMUP_STEPS + LEAST_STEPS
        return Pause(leave=enough and time.perf_counter() - self.began > self.least_seconds)


def _gather(store: Store, key: str, rank: int, world_size: int, text: str) -> list[str]:
    """Return what every rank says, in rank order."""
    store.set(f"{key}/{rank}", text)
    return [store.get(f"{key}/{peer}").decode() for peer in range(world_size)]


def _memory(key: str) -> int:
    """Return a figure of this process in bytes, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _state_bytes(engine: Engine) -> int:
    """Return the bytes of this rank's master weights and optimizer state."""
    return sum(tensor.nbytes for group in engine.optimizer.flat_state(engine.rank) for tensor in group.tensors.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
