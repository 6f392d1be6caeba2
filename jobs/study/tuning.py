"""A grid of learning rates that grows where its best is at its end, alike for all that are compared.

Equal effort is the invariant: after every round each optimizer has had as many trials as any other. Where the best of
one is at the end of its grid, that one gets a trial beyond it, and the others one between their best and its better
neighbour, where a trial helps them most.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field
from math import inf, sqrt
from typing import Any, ClassVar, Protocol

from optim.checks import Check, within

Choice = tuple[float, float | None]
"""Learning rate and weight decay; None: as the config has it."""
Losses = Mapping[float, float]
"""By learning rate; infinite where the trial failed."""
LEAST_STEPS = 10
"""Of a trial: fewer compare nothing."""


class Tunes(Protocol):
    """A question that compares optimizers, each at the best rate of a grid."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning rates to begin with, by optimizer."""
        ...

    @property
    def factors(self) -> tuple[float, ...]:
        """Times these rates: the grid."""
        ...

    @property
    def baseline(self) -> str:
        """The optimizer to which the others are compared."""
        ...


@dataclass
class Tuned:
    """How far the tuning of one size has come."""

    tried: dict[str, list[Choice]]
    """By optimizer, in the order in which they were asked for."""
    best: dict[tuple[str, float], Choice] = field(default_factory=dict)
    """By optimizer and budget, when it is finished; without those of which every trial failed."""
    border: dict[tuple[str, float], bool] = field(default_factory=dict)
    """Whether the best is at an end of its grid still."""
    extended: int = 0
    """Rounds after the first."""
    finished: bool = False


@dataclass(frozen=True)
class Grid:
    """How a learning rate is tuned."""

    factors: tuple[float, ...]
    """Times the start."""
    decays: tuple[float | None, ...]
    extend: int
    """Rounds after the first, at most."""


def tune(
    grid: Grid,
    starts: Mapping[str, float],
    budgets: Sequence[float],
    loss_of: Callable[[str, Choice, float], float | None],
) -> Tuned:
    """Return what is to be tried, as far as is known, and what was best.

    Args:
        grid: of each optimizer.
        starts: learning rates, by optimizer.
        budgets: at each of which a choice is compared; the longest one decides where the grid grows.
        loss_of: the loss of an optimizer with a choice at a budget; infinite: it failed; None: not known yet.
    """
    tried: dict[str, list[Choice]] = {
        name: [(rounded(start * factor), decay) for decay in grid.decays for factor in grid.factors]
        for name, start in starts.items()
    }
    found = Tuned(tried)
    longest = sorted(budgets, reverse=True)
    while True:
        losses = {
            (name, budget): {choice: loss_of(name, choice, budget) for choice in choices}
            for name, choices in found.tried.items()
            for budget in longest
        }
        if any(loss is None for of in losses.values() for loss in of.values()):
            return found
        known: dict[tuple[str, float], dict[Choice, float]] = losses  # type: ignore[assignment]
        rates = {key: _at_best_decay(of) for key, of in known.items()}
        if len(grid.factors) > 1:
            found.border = {key: at_border(of) for key, (_, of) in rates.items()}
        if found.extended == grid.extend or not any(found.border.values()):
            found.best = {key: min(of, key=of.__getitem__) for key, of in known.items() if min(of.values()) < inf}
            found.finished = True
            return found
        found.extended += 1
        for name in starts:
            budget = next((one for one in longest if found.border[name, one]), longest[0])
            decay, of = rates[name, budget]
            found.tried[name].append((one_more(of), decay))


def one_more(losses: Losses) -> float:
    """Return the learning rate to try next: beyond the end where the best is there, else beside the best."""
    rates = sorted(losses)
    best = min(rates, key=lambda rate: (losses[rate], rate))
    at = rates.index(best)
    if at == 0:
        return rounded(best**2 / rates[1])
    if at == len(rates) - 1:
        return rounded(best**2 / rates[-2])
    return rounded(sqrt(best * min(rates[at - 1], rates[at + 1], key=losses.__getitem__)))


def at_border(losses: Losses) -> bool:
    """Tell whether the best is at an end; where all failed the lowest counts as the best."""
    rates = sorted(losses)
    return min(rates, key=lambda rate: (losses[rate], rate)) in (rates[0], rates[-1])


def seed_problems(seeds: Sequence[int]) -> list[str]:
    """Return what is wrong with a study's seeds: one that is there twice would pass for two that agree."""
    if seeds and len(set(seeds)) == len(seeds):
        return []
    return [f"seeds: must be one or more, each once, not {[*seeds]}"]


def tuning_checks(question: "Tunes") -> Iterator[Check]:
    """Yield the checks of a question's grid and warm-up."""
    text = "factors must be 1 (no tuning) or 3 and more, so that a best can lie inside"
    yield len(question.factors) != 2, text
    yield from within(question, "[0, 8]", "extend")
    yield from within(question, "[0, 0.5]", "warmup")


def optimizer_problems(question: "Tunes", optimizers: Collection[str], tuned: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with the optimizers that are compared.

    Args:
        question: that compares them.
        optimizers: their names on the axis.
        tuned: those that need a learning rate to begin with.
    """
    if len(optimizers) < 2:
        yield "axes.optimizer: a ratio needs two optimizers or more"
    if question.baseline not in optimizers:
        yield f"question.baseline: must be one of {', '.join(optimizers)}, not {question.baseline!r}"
    if missing := [name for name in tuned if not question.rates.get(name, 0) > 0]:
        yield f"question.rates: needs a learning rate above 0 for {', '.join(missing)}"


def rounded(rate: float) -> float:
    """Return a rate as names of trials have it."""
    return float(f"{rate:.6g}")


def _at_best_decay(losses: Mapping[Choice, float]) -> tuple[float | None, dict[float, float]]:
    """Return the weight decay of the best choice, and the losses by learning rate with it."""
    decay = min(losses, key=losses.__getitem__)[1]
    return decay, {rate: loss for (rate, of), loss in losses.items() if of == decay}
