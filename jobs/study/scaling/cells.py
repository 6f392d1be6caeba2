"""What each size has come to under each optimizer, and the curves of the loss over what it cost."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from jobs.study.combinations import usable
from jobs.study.fits.measured import Measured
from jobs.study.question import Outcome
from jobs.study.scaling.plan import Plan
from jobs.study.tuning import Choice

ALIKE = 1.05
"""Ratio of two costs below which the sizes compete for one budget, whose whole steps differ a little."""


@dataclass(frozen=True)
class Cell:
    """A size, an optimizer and a budget, at the best choice of the tuning."""

    size: str
    optimizer: str
    budget: float
    choice: Choice
    outcomes: tuple[Outcome, ...]
    """Of the seeds that came to a loss."""

    @property
    def losses(self) -> list[float]:
        """At the end of the schedule, nats per token."""
        return [outcome.val_loss for outcome in self.outcomes if outcome.val_loss is not None]

    @property
    def loss(self) -> float:
        """Their mean."""
        return fmean(self.losses)

    @property
    def parameters(self) -> int:
        """All but embedding and head."""
        return self.outcomes[0].parameters

    @property
    def tokens(self) -> int:
        """Of a run."""
        return self.outcomes[0].tokens

    @property
    def flops(self) -> float:
        """Of the model, in a run."""
        return self.outcomes[0].flops

    @property
    def all_flops(self) -> float:
        """Of model and optimizer."""
        return self.flops + self.outcomes[0].optimizer_flops

    @property
    def seconds(self) -> float:
        """Of a run from its first step; mean over the seeds."""
        return fmean(map(_whole_seconds, self.outcomes))


COSTS: dict[str, Callable[[Cell], float]] = {
    "FLOPs of the model": lambda cell: cell.flops,
    "FLOPs of model and optimizer": lambda cell: cell.all_flops,
    "seconds in steps": lambda cell: cell.seconds,
}
"""What a loss may cost; the first is what papers compare."""


def cells_of(plan: Plan) -> list[Cell]:
    """Return what is known, in the order of sizes, budgets and optimizers."""
    found = []
    for size in plan.sizes:
        for budget in sorted(plan.question.budgets):
            for optimizer in plan.optimizers:
                if (choice := plan.best(size, optimizer, budget)) is None:
                    continue
                outcomes = (plan.outcome(size, optimizer, choice, seed, budget) for seed in plan.study.seeds)
                if usables := tuple(one for one in outcomes if one is not None and usable(one)):
                    found.append(Cell(size, optimizer, budget, choice, usables))
    return found


def curve_of(cells: Iterable[Cell], cost: Callable[[Cell], float], several_budgets: bool) -> Measured:
    """Return the losses over a cost: all, or of several budgets those that no cheaper one beats.

    Raises:
        Unidentified: two have one cost, or there is one without a cost.
    """
    ordered = sorted(cells, key=lambda cell: (cost(cell), cell.loss))
    kept = _frontier(ordered, cost) if several_budgets else ordered
    return Measured.of((cost(cell), cell.losses) for cell in kept)


def _frontier(ordered: Sequence[Cell], cost: Callable[[Cell], float]) -> list[Cell]:
    kept: list[Cell] = []
    for cell in ordered:
        if kept and cell.loss >= kept[-1].loss:
            continue
        if kept and cost(cell) <= ALIKE * cost(kept[-1]):
            kept.pop()
        kept.append(cell)
    return kept


def _whole_seconds(outcome: Outcome) -> float:
    """Return the seconds of a run from its first step: a branch has spent those of its own steps alone."""
    first = outcome.losses[0][0] if outcome.losses else 1
    return outcome.seconds * outcome.steps / max(1, outcome.steps - first + 1)
