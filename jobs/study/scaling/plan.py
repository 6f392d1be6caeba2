"""The trials of a scaling law: tuning at each size, then the best with further seeds; budgets by branches if asked.

With `branched`, a run to the longest budget is the trunk, whose learning rate stays at its peak (wsd) until its own
decay. A shorter budget is a trial that goes on from the trunk at the step where its own decay begins, so that it is
the very run that it would have been from the start.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import floor
from typing import TYPE_CHECKING

from jobs.study.combinations import final_loss
from jobs.study.configs import config_of
from jobs.study.question import Branch, Outcome, Study, Trial, points, trial_name
from jobs.study.tuning import Choice, Grid, Tuned, tune
from orchestrator.config import RunConfig

if TYPE_CHECKING:
    from jobs.study.questions.scaling_law import ScalingLaw


class Plan:
    """What is known to be needed, given what is done.

    Args:
        question: the question.
        study: whose it is.
        done: outcomes by trial.
    """

    def __init__(self, question: "ScalingLaw", study: Study, done: Mapping[str, Outcome]) -> None:
        self.question, self.study, self.done = question, study, done
        self.sizes = points(study.axes["size"], "size")
        self.optimizers = points(study.axes["optimizer"], "optimizer")

    @cached_property
    def tuned(self) -> dict[str, Tuned]:
        """How far each size's tuning is, in the order of the file; sizes that wait for the one before are not there."""
        question, found = self.question, dict[str, Tuned]()
        starts = dict(question.rates)
        if question.reuse:
            starts = {question.reuse: starts[question.reuse]}
        grid = Grid(question.factors, question.weight_decays or (None,), question.extend)
        for size in self.sizes:
            found[size] = one = self._tune(size, grid, starts)
            if question.centre == "previous":
                if not one.finished:
                    break
                longest = max(question.budgets)
                starts |= {name: best[0] for (name, budget), best in one.best.items() if budget == longest}
        return found

    def _tune(self, size: str, grid: Grid, starts: Mapping[str, float]) -> Tuned:
        def loss_of(optimizer: str, choice: Choice, budget: float) -> float | None:
            return self.loss(size, optimizer, choice, self.first_seed, budget)

        return tune(grid, {name: starts[name] for name in self.tuned_optimizers}, self.question.budgets, loss_of)

    @property
    def tuned_optimizers(self) -> list[str]:
        """Those that have trials to tune."""
        return [name for name in self.optimizers if self.question.reuse in ("", name)]

    @property
    def first_seed(self) -> int:
        """The seed of the tuning."""
        return self.study.seeds[0]

    def best(self, size: str, optimizer: str, budget: float) -> Choice | None:
        """Return the best choice; None where it is not known, or where nothing came to a loss."""
        tuned = self.tuned.get(size)
        source = self.question.reuse or optimizer
        return tuned.best.get((source, budget)) if tuned is not None and tuned.finished else None

    def trials(self) -> Iterator[Trial]:
        """Yield all that is known to be needed, each once."""
        seen = set[str]()
        for size, optimizer, choice, seed, budgets in self._asked():
            for trial in self._runs(size, optimizer, choice, seed, budgets):
                if trial.name not in seen:
                    seen.add(trial.name)
                    yield trial

    def _asked(self) -> Iterator[tuple[str, str, Choice, int, Sequence[float]]]:
        budgets = self.question.budgets
        for size, tuned in self.tuned.items():
            rounds = max(map(len, tuned.tried.values()))
            for number in range(rounds):  # Optimizers in turn: an early look then finds both.
                for optimizer, choices in tuned.tried.items():
                    yield size, optimizer, choices[number], self.first_seed, budgets
        for seed in self.study.seeds:
            for size in self.tuned:
                for optimizer in self.optimizers:
                    for choice, of in self._by_choice(size, optimizer).items():
                        if seed != self.first_seed or optimizer not in self.tuned_optimizers:
                            yield size, optimizer, choice, seed, of

    def _by_choice(self, size: str, optimizer: str) -> dict[Choice, list[float]]:
        """Return the budgets at which each choice is the best."""
        found: dict[Choice, list[float]] = {}
        for budget in self.question.budgets:
            if (best := self.best(size, optimizer, budget)) is not None:
                found.setdefault(best, []).append(budget)
        return found

    def _runs(self, size: str, optimizer: str, choice: Choice, seed: int, budgets: Sequence[float]) -> Iterator[Trial]:
        *shorter, longest = sorted(budgets)
        trunk = self._trial(size, optimizer, choice, seed, longest)
        yield trunk
        for budget in reversed(shorter):
            branch = None
            if self.question.branched:
                branch = Branch(trial=trunk.name, step=self.decay_begins(size, optimizer, budget))
            yield self._trial(size, optimizer, choice, seed, budget, branch)

    def _trial(
        self, size: str, optimizer: str, choice: Choice, seed: int, budget: float, branch: Branch | None = None
    ) -> Trial:
        rate, decay = choice
        settings = {**self.sizes[size], **self.optimizers[optimizer], "optim.lr": rate}
        if decay is not None:
            settings["optim.weight_decay"] = decay
        settings["train.steps"] = self.steps(size, optimizer, budget)
        if self.question.warmup:
            settings["optim.warmup_steps"] = self.warmup_steps(size, optimizer, budget)
        coordinates = self._coordinates(size, optimizer, choice, seed, budget)
        return Trial(
            name=trial_name(**coordinates), settings=settings, coordinates=coordinates, seed=seed, branch=branch
        )

    def _coordinates(
        self, size: str, optimizer: str, choice: Choice, seed: int, budget: float
    ) -> dict[str, str | float]:
        rate, decay = choice
        found: dict[str, str | float] = {"size": size, "optimizer": optimizer, "lr": rate, "seed": seed}
        if decay is not None:
            found["weight_decay"] = decay
        if len(self.question.budgets) > 1:
            found["budget"] = budget
        return found

    def outcome(self, size: str, optimizer: str, choice: Choice, seed: int, budget: float) -> Outcome | None:
        """Return what a trial has come to; None where it is not done."""
        return self.done.get(trial_name(**self._coordinates(size, optimizer, choice, seed, budget)))

    def loss(self, size: str, optimizer: str, choice: Choice, seed: int, budget: float) -> float | None:
        """Return the loss at the end of a trial's schedule; infinite where it failed, None where it is not done."""
        outcome = self.outcome(size, optimizer, choice, seed, budget)
        return None if outcome is None else final_loss(outcome)

    def config(self, size: str, optimizer: str) -> RunConfig:
        """Return the config of a size, as long as its base."""
        return config_of(self.study, {**self.sizes[size], **self.optimizers[optimizer]})

    def steps(self, size: str, optimizer: str, budget: float) -> int:
        """Return the steps of a budget."""
        return round(
            self.question.tokens_of(self.config(size, optimizer), budget) / self.tokens_per_step(size, optimizer)
        )

    def tokens_per_step(self, size: str, optimizer: str) -> int:
        """Return the tokens of a batch."""
        train = self.config(size, optimizer).train
        return train.global_batch * train.seq_len

    def warmup_steps(self, size: str, optimizer: str, budget: float) -> int:
        """Return the steps of warm-up: with branches those of the shortest budget for all, as they have one trunk."""
        of = min(self.question.budgets) if self.question.branched else budget
        return round(self.question.warmup * self.steps(size, optimizer, of))

    def decay_begins(self, size: str, optimizer: str, budget: float) -> int:
        """Return the last step at the peak of the learning rate."""
        optim = self.config(size, optimizer).optim
        return floor((1 - optim.decay_fraction) * self.steps(size, optimizer, budget))
