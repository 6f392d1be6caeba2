"""Outcomes by a formula in the place of training: loss of size, tokens, learning rate, optimizer and seed.

The optimum of the learning rate and the laws are known, so that what a question makes of them can be compared.
"""

import zlib
from collections.abc import Callable, Mapping
from math import exp, log

import numpy as np

from jobs.study.configs import config_of
from jobs.study.question import Outcome, Study, Trial
from jobs.study.size import size_of

BEST = {"adamw": 5e-3, "muon": 1.7e-2}
LAWS = {"adamw": (2.2 * 1e11**0.06, 0.06), "muon": (2.2 * 6e10**0.065, 0.065)}
"""A and b of `L = A C^-b`."""


def noise_of(trial: Trial) -> float:
    """Return normal noise that a trial has each time."""
    return float(np.random.default_rng(zlib.crc32(trial.name.encode())).standard_normal())


def train(study: Study, trial: Trial, noise: float = 0.0) -> Outcome:
    """Return what a trial comes to; its loss is the law's at the best rate, and more by a parabola beside it."""
    config = config_of(study, trial.settings)
    size, optimizer, steps = size_of(config), config.optim.name, config.train.steps
    tokens = steps * config.train.global_batch * config.train.seq_len
    scale, exponent = LAWS[optimizer]
    loss = scale * (size.flops_per_token * tokens) ** -exponent
    loss *= 1 + 0.02 * log(config.optim.lr / BEST[optimizer]) ** 2
    loss *= exp(noise * noise_of(trial))
    first = trial.branch.step if trial.branch else 0
    return Outcome(
        trial=trial.name,
        run_id=f"run-of-{trial.name}",
        status="finished",
        coordinates=trial.coordinates,
        steps=steps,
        tokens=tokens,
        val_loss=loss,
        losses=[(step, loss + 1 / step) for step in range(first + 1, steps + 1)],
        parameters=size.parameters,
        flops=size.flops_per_token * tokens,
        optimizer_flops=size.optimizer_flops * steps,
        seconds=(steps - first) * size.flops_per_token * (1.1 if optimizer == "muon" else 1.0),
    )


def run(study: Study, outcome: Callable[[Trial], Outcome]) -> tuple[dict[str, Outcome], list[Trial]]:
    """Do a study one trial at a time, the last that is asked for first, and return outcomes and trials.

    Fails where a question asks for one twice, takes one back, or forgets what it is.
    """
    done: dict[str, Outcome] = {}
    known: dict[str, Trial] = {}
    while True:
        asked: Mapping[str, Trial] = {trial.name: trial for trial in study.question.trials(study, done)}
        assert len(asked) == len(study.question.trials(study, done)), "a trial twice"
        assert all(asked.get(name) == trial for name, trial in known.items()), "a trial taken back, or another one"
        known = dict(asked)
        waiting = [trial for name, trial in known.items() if name not in done]
        if not waiting:
            return done, [*known.values()]
        for trial in waiting:
            assert trial.branch is None or trial.branch.trial in known, "a branch from nowhere"
        done[waiting[-1].name] = outcome(waiting[-1])
