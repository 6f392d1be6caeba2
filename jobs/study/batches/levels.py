"""From outcomes to tokens until a loss: curves over tokens, the losses at which they are compared, and T_L(B)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, log

from jobs.study.batches.plan import Plan
from jobs.study.fits.batch import smoothed, tokens_to
from jobs.study.question import Outcome

EARLY = 0.25
"""Share of the tokens: losses that the slowest run has before are of its start, not of its batch."""
SHARE = 1000
"""Of the budget, so many parts: the unit in which training losses are smoothed."""

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """A seed of a batch under an optimizer."""

    optimizer: str
    batch: str
    outcome: Outcome
    curve: Curve

    @property
    def tokens_per_step(self) -> float:
        """Of the batch."""
        return self.outcome.tokens / self.outcome.steps


def runs_of(plan: Plan) -> list[Run]:
    """Return all runs at their best learning rate that have a curve."""
    found = [
        Run(optimizer, batch, outcome, curve_of(plan, outcome))
        for optimizer in plan.optimizers
        for batch in plan.batches
        for outcome in plan.best_outcomes(optimizer, batch)
        if outcome.steps and outcome.tokens
    ]
    return [run for run in found if len(run.curve) > 1]


def curve_of(plan: Plan, outcome: Outcome) -> Curve:
    """Return the losses of a run over its tokens: of its validations, or of the training, smoothed."""
    per_step, question = outcome.tokens / outcome.steps, plan.question
    series = outcome.validation if question.losses == "validation" else outcome.losses
    curve = [(step * per_step, loss) for step, loss in series if isfinite(loss)]
    return curve if question.losses == "validation" else smoothed(curve, question.smoothing, question.tokens / SHARE)


def levels_of(runs: Sequence[Run], count: int) -> list[float]:
    """Return losses that all runs come to, in equal ratios, falling from where the slowest is past its start."""
    if not runs:
        return []
    low = max(min(loss for _, loss in run.curve) for run in runs)
    high = max(_after(run.curve, EARLY) for run in runs)
    if count == 1 or high <= low:
        return [low]
    return [exp(log(high) + (log(low) - log(high)) * i / (count - 1)) for i in range(count)]


def tokens_until(runs: Sequence[Run], optimizer: str, loss: float) -> dict[float, list[float]]:
    """Return the tokens of each seed until a loss, by the tokens of a batch.

    Nothing of a batch of which one seed never comes to it: what is left would be those that are fast.
    """
    found: dict[float, list[float | None]] = {}
    for run in runs:
        if run.optimizer == optimizer:
            found.setdefault(run.tokens_per_step, []).append(tokens_to(run.curve, loss) or None)
    whole = {batch: [one for one in of if one is not None] for batch, of in sorted(found.items())}
    return {batch: of if len(of) == len(found[batch]) else [] for batch, of in whole.items()}


def noise_scales(runs: Sequence[Run]) -> dict[tuple[str, float], list[float]]:
    """Return the gradient's noise scale of each seed that has one, in tokens, by optimizer and tokens of a batch."""
    found: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        if (scale := run.outcome.noise_scale) is not None:
            found.setdefault((run.optimizer, run.tokens_per_step), []).append(scale)
    return found


def _after(curve: Curve, share: float) -> float:
    """Return the loss of the first record after a share of the tokens."""
    return next(loss for tokens, loss in curve if tokens >= share * curve[-1][0])
