"""What a run takes of this machine, while a local Ray starts: a model that is too large is else killed by the system.

The plan is an estimate, within a quarter of what was measured, so only what is beyond that is refused.
"""

import os
from collections.abc import Callable

import torch

from jobs.planning.choice import decided, memory_alone
from jobs.planning.estimate import Machines, gigabytes, memory_on, needed_on
from jobs.planning.memory import PROCESS_BYTES
from jobs.planning.plan import require_fit
from jobs.planning.state import layout_of
from orchestrator.config import RunConfig

CLEARLY = 1.25
"""Times the memory that is there: more cannot fit, however wrong the plan is (docs/commands/plan.md)."""
TIGHT = 0.9


def workers_here(config: RunConfig) -> int:
    """Return how many workers a local Ray would start; whether they are enough is told by Ray."""
    if _on_gpus(config):
        slots = torch.cuda.device_count()
    else:
        slots = int(len(os.sched_getaffinity(0)) / config.scaling.cpus_per_worker)
    return max(1, min(config.scaling.max_workers, slots))


def look_here(config: RunConfig, workers: int, free: int, warn: Callable[[str], object]) -> str:
    """Return a line about what the run needs and what is there.

    Args:
        config: of the run.
        workers: on this machine.
        free: bytes of memory that this machine has left without the run.
        warn: is told where memory is tight.

    Raises:
        ConfigError: it clearly does not fit; with its parts, and with what would.
    """
    cuda = _on_gpus(config)
    name, room = "this machine", free
    if cuda:
        name, room = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    device = memory_alone(room, name, "cuda" if cuda else "cpu")
    machines = Machines(gpus=workers, gpus_per_node=workers, calibration=device)
    chosen = decided(config, machines)
    memory = memory_on(chosen, machines, device)
    if (needed := needed_on(memory, machines, device)) > CLEARLY * room:
        require_fit(config, machines, device, memory)
    kept = memory.keeper_bytes_per_node
    if needed > TIGHT * room:
        warn(f"memory is tight: about {gigabytes(needed)} are needed, {name} has {gigabytes(room)}")
    elif kept > TIGHT * free:
        warn(f"memory is tight: about {gigabytes(kept)} are needed for snapshots, {gigabytes(free)} are free")
    parameters = layout_of(config.model, config.optim, workers).parameters
    many = f"{workers} worker{'s' if workers > 1 else ''}"
    if cuda:
        return (
            f"{parameters:,} parameters; each of {many} needs about {gigabytes(needed)} of its GPU's {gigabytes(room)} "
            f"({name}), and snapshots {gigabytes(kept)} of {gigabytes(free)} free memory"
        )
    each = memory.peak + PROCESS_BYTES
    return (
        f"{parameters:,} parameters; {many} of about {gigabytes(each)} each and snapshots of {gigabytes(kept)} need "
        f"{gigabytes(needed)} of {gigabytes(room)} free memory"
    )


def _on_gpus(config: RunConfig) -> bool:
    return torch.cuda.is_available() and config.scaling.accelerator != "cpu"
