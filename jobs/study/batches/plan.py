"""The trials of a batch-size study: each batch tuned under each optimizer, the best with further seeds, and branches.

A branch goes on from the run at the smallest batch with a multiple of its batch and the root of that times its learning
rate, for the same tokens each (arXiv 2505.23971). As a run knows its batch by stages, the trunk is the first of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import TYPE_CHECKING

from jobs.study.combinations import final_loss, usable
from jobs.study.configs import config_of
from jobs.study.question import Branch, Outcome, Study, Trial, points, trial_name
from jobs.study.tuning import Choice, Grid, Tuned, rounded, tune
from orchestrator.config import RunConfig

if TYPE_CHECKING:
    from jobs.study.questions.batch_size import BatchSize

AXES = ("batch", "train.global_batch")
"""Names that the axis of the batches may have: named points, or a list of sequences per step."""
WHOLE = 0.0
"""The one budget of the tuning."""


@dataclass(frozen=True)
class Fork:
    """Where and with what a branch goes on."""

    tokens: float
    """After which it branches off."""
    factor: int
    """Times the trunk's batch."""


class Plan:
    """What is known to be needed, given what is done.

    Args:
        question: the question.
        study: whose it is.
        done: outcomes by trial.
    """

    def __init__(self, question: "BatchSize", study: Study, done: Mapping[str, Outcome]) -> None:
        self.question, self.study, self.done = question, study, done
        axis = next(name for name in AXES if name in study.axes)
        self.batches = points(study.axes[axis], axis)
        self.optimizers = points(study.axes["optimizer"], "optimizer")

    def sequences(self, batch: str) -> int:
        """Return the sequences of a batch."""
        return int(self.batches[batch]["train.global_batch"])

    @cached_property
    def smallest(self) -> str:
        """The label of the smallest batch: from its run branches go off."""
        return min(self.batches, key=self.sequences)

    def start(self, optimizer: str, batch: str) -> float:
        """Return the learning rate around which a batch is tuned."""
        reference = self.question.rate_batch or self.sequences(self.smallest)
        scale = (self.sequences(batch) / reference) ** self.question.rate_exponent
        return rounded(self.question.rates[optimizer] * scale)

    @cached_property
    def tuned(self) -> dict[str, Tuned]:
        """How far each batch's tuning is."""
        grid = Grid(self.question.factors, (None,), self.question.extend)
        return {batch: self._tune(batch, grid) for batch in self.batches}

    def _tune(self, batch: str, grid: Grid) -> Tuned:
        def loss_of(optimizer: str, choice: Choice, budget: float) -> float | None:
            outcome = self.outcome(optimizer, batch, choice[0], self.first_seed)
            return None if outcome is None else final_loss(outcome)

        return tune(grid, {name: self.start(name, batch) for name in self.optimizers}, [WHOLE], loss_of)

    @property
    def first_seed(self) -> int:
        """The seed of the tuning."""
        return self.study.seeds[0]

    def best(self, optimizer: str, batch: str) -> float | None:
        """Return the best learning rate; None where it is not known, or where nothing came to a loss."""
        choice = self.tuned[batch].best.get((optimizer, WHOLE))
        return None if choice is None else choice[0]

    def outcome(self, optimizer: str, batch: str, rate: float, seed: int) -> Outcome | None:
        """Return what a trial has come to; None where it is not done."""
        return self.done.get(trial_name(**_coordinates(optimizer, batch, rate, seed)))

    def best_outcomes(self, optimizer: str, batch: str) -> list[Outcome]:
        """Return those of all seeds at the best rate that came to a loss."""
        if (rate := self.best(optimizer, batch)) is None:
            return []
        outcomes = (self.outcome(optimizer, batch, rate, seed) for seed in self.study.seeds)
        return [one for one in outcomes if one is not None and usable(one)]

    def trials(self) -> Iterator[Trial]:
        """Yield all that is known to be needed: the tuning, the seeds, the branches."""
        for batch, tuned in self.tuned.items():
            for number in range(max(map(len, tuned.tried.values()))):
                for optimizer, choices in tuned.tried.items():
                    yield self._trial(optimizer, batch, choices[number][0], self.first_seed)
        best = {
            (optimizer, batch): self.best(optimizer, batch) for batch in self.batches for optimizer in self.optimizers
        }
        for seed in self.study.seeds[1:]:
            yield from (self._trial(*of, rate, seed) for of, rate in best.items() if rate is not None)
        for fork in self.forks:
            for optimizer in self.optimizers:
                if (rate := best[optimizer, self.smallest]) is not None:
                    yield self._branch(optimizer, rate, fork)

    def _trial(self, optimizer: str, batch: str, rate: float, seed: int) -> Trial:
        steps, question = self.steps(optimizer, batch), self.question
        settings = {**self._settings(optimizer, batch, rate), "train.steps": steps}
        if question.validations:
            settings["train.validate_every"] = max(1, steps // question.validations)
        if batch == self.smallest and seed == self.first_seed and question.branch_at:
            # Which rate is the best is known when all have ended: each may be the trunk.
            settings["checkpoint.at"] = sorted({self.fork_step(optimizer, fork) for fork in self.forks})
        coordinates = _coordinates(optimizer, batch, rate, seed)
        return Trial(name=trial_name(**coordinates), settings=settings, coordinates=coordinates, seed=seed)

    def _settings(self, optimizer: str, batch: str, rate: float) -> dict:
        settings = {**self.batches[batch], **self.optimizers[optimizer], "optim.lr": rate}
        if self.question.warmup:
            settings["optim.warmup_steps"] = round(self.question.warmup * self.steps(optimizer, batch))
        return settings

    @property
    def forks(self) -> list[Fork]:
        """All places where branches go off, and with what."""
        question = self.question
        return [Fork(tokens, factor) for tokens in question.branch_at for factor in question.branch_factors]

    def branch_outcome(self, optimizer: str, fork: Fork) -> Outcome | None:
        """Return what a branch has come to; None where it is not done."""
        if (rate := self.best(optimizer, self.smallest)) is None:
            return None
        return self.done.get(trial_name(**self._fork_coordinates(optimizer, rate, fork)))

    def _fork_coordinates(self, optimizer: str, rate: float, fork: Fork) -> dict[str, str | float]:
        known = _coordinates(optimizer, self.smallest, rate, self.first_seed)
        return {**known, "branch_at": fork.tokens, "factor": fork.factor}

    def _branch(self, optimizer: str, rate: float, fork: Fork) -> Trial:
        trunk = trial_name(**_coordinates(optimizer, self.smallest, rate, self.first_seed))
        sequences, step = self.sequences(self.smallest), self.fork_step(optimizer, fork)
        stages = [
            {"name": "trunk", "steps": step},
            {
                "name": "branch",
                "steps": self.branch_steps(optimizer, fork),
                "global_batch": fork.factor * sequences,
                "schedule": "constant",
                "lr": rounded(rate * sqrt(fork.factor)),
            },
        ]
        settings = {**self._settings(optimizer, self.smallest, rate), "train.steps": 0, "train.stages": stages}
        coordinates = self._fork_coordinates(optimizer, rate, fork)
        return Trial(
            name=trial_name(**coordinates),
            settings=settings,
            coordinates=coordinates,
            seed=self.first_seed,
            branch=Branch(trial=trunk, step=step),
        )

    def fork_step(self, optimizer: str, fork: Fork) -> int:
        """Return the step of the trunk after which a branch goes off."""
        return round(fork.tokens / self.tokens_per_step(optimizer, self.smallest))

    def branch_steps(self, optimizer: str, fork: Fork) -> int:
        """Return the steps of a branch."""
        return round(self.question.branch_tokens / (fork.factor * self.tokens_per_step(optimizer, self.smallest)))

    def config(self, optimizer: str, batch: str) -> RunConfig:
        """Return the config of a batch, as long as its base."""
        return config_of(self.study, {**self.batches[batch], **self.optimizers[optimizer]})

    def tokens_per_step(self, optimizer: str, batch: str) -> int:
        """Return the tokens of a batch."""
        train = self.config(optimizer, batch).train
        return train.global_batch * train.seq_len

    def steps(self, optimizer: str, batch: str) -> int:
        """Return the steps of a run with a batch."""
        return round(self.question.tokens / self.tokens_per_step(optimizer, batch))


def _coordinates(optimizer: str, batch: str, rate: float, seed: int) -> dict[str, str | float]:
    return {"optimizer": optimizer, "batch": batch, "lr": rate, "seed": seed}
