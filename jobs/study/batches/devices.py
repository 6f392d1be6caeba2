"""The time until a loss on so many devices: measured steps, times the seconds that the plan gives a step. Simulated."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jobs.study.batches.found import Level
from jobs.study.batches.levels import Run
from jobs.study.batches.plan import Plan
from jobs.study.configs import config_of
from jobs.study.fits.batch import Place, pareto
from orchestrator.config import RunConfig

LARGEST_MICRO_BATCH = 16


def pareto_curves(plan: Plan, runs: Sequence[Run], level: Level) -> dict[str, list[Place]]:
    """Return for each optimizer the batches and devices that no others beat.

    Raises:
        ConfigError: a device is not known, or a config cannot be planned.
    """
    return {name: pareto(_places(plan, runs, name, level.of[name].means)) for name in plan.optimizers}


def _places(plan: Plan, runs: Sequence[Run], optimizer: str, tokens: Mapping[float, float]) -> list[Place]:
    labels = {run.tokens_per_step: run.batch for run in runs if run.optimizer == optimizer}
    found = []
    for batch, needed in tokens.items():
        config = config_of(plan.study, {**plan.batches[labels[batch]], **plan.optimizers[optimizer]})
        for devices in plan.question.devices:
            if config.train.global_batch % devices == 0:
                seconds = needed / batch * step_seconds(config, devices, plan.question.gpu_type)
                found.append(Place(batch, devices, seconds))
    return found


def step_seconds(config: RunConfig, devices: int, gpu_type: str) -> float:
    """Return what the plan gives a step of a config on so many devices, with the largest micro-batch up to 16."""
    from jobs.planning.estimate import Machines, time_on  # They import torch.

    each = config.train.global_batch // devices
    micro = max(size for size in range(1, LARGEST_MICRO_BATCH + 1) if each % size == 0)
    machines = Machines(gpus=devices, gpu_type=gpu_type)
    return time_on(
        replace(config, train=replace(config.train.plain(), micro_batch=micro)), machines, machines.device()
    ).training
