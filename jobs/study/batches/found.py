"""What a batch-size study finds at each loss, and where its branches place the critical batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import geometric_mean

import numpy as np

from jobs.study.batches.levels import Run, levels_of, runs_of, tokens_until
from jobs.study.batches.plan import Fork, Plan
from jobs.study.combinations import usable
from jobs.study.fits.batch import (
    Growth,
    batch_schedule,
    branched_critical,
    smoothed,
    token_optimal,
    token_ratios,
)
from jobs.study.fits.critical import TwoPiece, fit_two_piece
from jobs.study.fits.estimate import Estimate, Unidentified
from jobs.study.fits.linear import least_squares

BRANCH_SMOOTHING = 0.5
"""What is left of a branch's average after the largest batch (arXiv 2505.23971)."""


@dataclass(frozen=True)
class OfOptimizer:
    """An optimizer at a loss; batches are in tokens."""

    tokens: dict[float, list[float]]
    """Of the seeds, until the loss."""
    optimal: float | None
    """The token-optimal batch."""
    critical: TwoPiece | None
    refusal: str = ""
    """Why there is no critical batch."""

    @property
    def means(self) -> dict[float, float]:
        """Tokens by batch, the geometric mean over the seeds; of those that come to the loss."""
        return {batch: geometric_mean(of) for batch, of in self.tokens.items() if of}


@dataclass(frozen=True)
class Level:
    """What is found at a loss."""

    loss: float
    of: dict[str, OfOptimizer]
    ratios: dict[str, dict[float, Estimate]]
    """R_L(B): the baseline's tokens over another optimizer's, by that and the batch."""
    trends: dict[str, Estimate | None]
    """The slope of ln R_L(B) over ln B; None with fewer than three batches."""


@dataclass(frozen=True)
class Branches:
    """What the branches of an optimizer say."""

    losses: dict[float, dict[float, float]]
    """At their ends, by the tokens after which they go off and their batch in sequences; infinite where one failed."""
    critical: dict[float, float]
    """Batch in sequences, by the tokens."""
    schedule: list[Growth]


def levels_found(plan: Plan, runs: Sequence[Run]) -> list[Level]:
    """Return what is found at each loss, by falling loss."""
    losses = sorted(plan.question.targets, reverse=True) or levels_of(runs, plan.question.levels)
    return [_level(plan, runs, loss) for loss in losses] if runs else []


def _level(plan: Plan, runs: Sequence[Run], loss: float) -> Level:
    of = {name: _of_optimizer(plan, tokens_until(runs, name, loss)) for name in plan.optimizers}
    first = of[plan.question.baseline].tokens
    others = [name for name in plan.optimizers if name != plan.question.baseline]
    ratios = {name: token_ratios(first, of[name].tokens) for name in others}
    return Level(loss, of, ratios, {name: trend(by_batch) for name, by_batch in ratios.items()})


def _of_optimizer(plan: Plan, tokens: dict[float, list[float]]) -> OfOptimizer:
    means = {batch: geometric_mean(of) if of else None for batch, of in tokens.items()}
    optimal = token_optimal(means, plan.question.tolerance)
    try:
        return OfOptimizer(tokens, optimal, fit_two_piece(tokens))
    except Unidentified as error:
        return OfOptimizer(tokens, optimal, None, str(error))


def trend(ratios: dict[float, Estimate]) -> Estimate | None:
    """Return the slope of ln R over ln B with Student's interval; None with fewer than three batches."""
    if len(ratios) < 3:
        return None
    x, y = np.log([*ratios]), np.log([ratio.value for ratio in ratios.values()])
    return least_squares([np.ones_like(x), x], y).estimate([0.0, 1.0])


def branches_found(plan: Plan) -> dict[str, Branches]:
    """Return what the branches of each optimizer say, of those places at which all are done."""
    return {name: found for name in plan.optimizers if (found := _branches(plan, name)).critical}


def _branches(plan: Plan, optimizer: str) -> Branches:
    losses: dict[float, dict[float, float]] = {}
    for tokens in plan.question.branch_at:
        forks = [Fork(tokens, factor) for factor in plan.question.branch_factors]
        ends = {fork.factor * plan.sequences(plan.smallest): _end(plan, optimizer, fork) for fork in forks}
        known = {float(batch): loss for batch, loss in ends.items() if loss is not None}
        if len(known) == len(forks):
            losses[tokens] = known
    critical = {at: branched_critical(of, plan.question.epsilon) for at, of in losses.items()}
    return Branches(losses, critical, batch_schedule(critical, plan.sequences(plan.smallest)))


def _end(plan: Plan, optimizer: str, fork: Fork) -> float | None:
    """Return the loss at a branch's end; infinite where it failed, None where it is not done."""
    if (outcome := plan.branch_outcome(optimizer, fork)) is None:
        return None
    if not usable(outcome) or outcome.val_loss is None:
        return inf
    if plan.question.losses == "validation":
        return outcome.val_loss
    # In units of the trunk's batch: all branches average over as many tokens.
    curve = [(step * fork.factor, loss) for step, loss in outcome.losses]
    return smoothed(curve, BRANCH_SMOOTHING, max(plan.question.branch_factors))[-1][1]


def found_in(plan: Plan) -> tuple[list[Run], list[Level], dict[str, Branches]]:
    """Return runs, levels and branches."""
    runs = runs_of(plan)
    return runs, levels_found(plan, runs), branches_found(plan)


def per_doubling(slope: Estimate) -> Estimate:
    """Return by what share R changes when the batch doubles."""
    return slope.through(lambda one: 2**one - 1)
