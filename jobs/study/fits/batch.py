"""What the batch costs: the tokens until a loss is reached, and what follows of them.

Essential AI, Practical Efficiency of Muon for Pretraining (arXiv 2505.02222): T_L(B) tokens until the smoothed loss is
first at L with batch B, S_L(B) = T_L(B) / B steps, the token ratio R_L(B) (equation 2), the token-optimal batch
(equation 6). The Allen Institute's Critical Batch Size Revisited (arXiv 2505.23971): the critical batch by branches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, nan, sqrt

import numpy as np
from scipy.special import stdtrit

from jobs.study.fits.estimate import CONFIDENCE, Estimate

TOLERANCE = 0.02
"""Tokens above the fewest that count as the fewest: an argmin alone hangs on the noise."""
EPSILON = 0.01
"""Nats by which the loss of a larger batch may lie above the best of the smaller ones (arXiv 2505.23971)."""

Curve = Sequence[tuple[float, float]]
"""`(tokens, nats per token)`, by rising tokens; all are finite."""


def smoothed(curve: Curve, keep: float, every: float) -> list[tuple[float, float]]:
    """Return the exponential moving average of a curve's losses.

    It is measured in tokens: the same texts are averaged at each batch, and each lags by the same tokens. By the step a
    batch of 32 times the size would lag by 32 times as many.

    Args:
        curve: to be smoothed.
        keep: what is left of the average after `every` tokens.
        every: tokens.
    """
    found: list[tuple[float, float]] = []
    for tokens, loss in curve:
        if not found:
            found.append((tokens, loss))
            continue
        before, mean = found[-1]
        left = keep ** ((tokens - before) / every)
        found.append((tokens, left * mean + (1 - left) * loss))
    return found


def tokens_to(curve: Curve, loss: float) -> float | None:
    """Return the tokens at which a curve first is at a loss, on the line between two records; None: it never is.

    The line is over the logarithm of the tokens, in which losses are nearly straight: validations lie far apart.
    """
    before: tuple[float, float] | None = None
    for tokens, at in curve:
        if at <= loss:
            if before is None:
                return tokens
            share = (before[1] - loss) / (before[1] - at)
            return before[0] * (tokens / before[0]) ** share if before[0] else share * tokens
        before = tokens, at
    return None


def token_optimal(tokens: Mapping[float, float | None], tolerance: float = TOLERANCE) -> float | None:
    """Return the largest batch that needs the fewest tokens, but for the tolerance; None: none comes to the loss.

    Args:
        tokens: by batch.
        tolerance: share of the fewest.
    """
    known = {batch: one for batch, one in tokens.items() if one is not None}
    return max((batch for batch, one in known.items() if one <= (1 + tolerance) * min(known.values())), default=None)


def token_ratios(
    first: Mapping[float, Sequence[float]], second: Mapping[float, Sequence[float]], confidence: float = CONFIDENCE
) -> dict[float, Estimate]:
    """Return R_L(B) with intervals: the first optimizer's tokens over the second's.

    How far seeds lie apart is pooled over all batches of an optimizer, in logarithms; Welch's interval takes the two
    optimizers' noise together.

    Args:
        first: tokens of each seed, by batch; a seed that never comes to the loss is left out.
        second: the same.
        confidence: of the intervals.
    """
    noises = _pooled(first), _pooled(second)
    return {
        batch: _ratio(first[batch], second[batch], noises, confidence)
        for batch in first
        if first[batch] and second.get(batch)
    }


def _pooled(tokens: Mapping[float, Sequence[float]]) -> tuple[float, int]:
    """Return the variance of ln T between seeds, and the degrees of freedom that it is of."""
    logs = [np.log(of) for of in tokens.values() if of]
    freedom = sum(len(of) - 1 for of in logs)
    return (sum(float(np.sum((of - of.mean()) ** 2)) for of in logs) / freedom if freedom else nan), freedom


def _ratio(
    first: Sequence[float], second: Sequence[float], noises: Sequence[tuple[float, int]], confidence: float
) -> Estimate:
    middle = float(np.mean(np.log(first)) - np.mean(np.log(second)))
    parts = [variance / len(of) for of, (variance, _) in zip((first, second), noises, strict=True)]
    if not all(freedom for _, freedom in noises):
        return Estimate(exp(middle), nan, nan)
    total = sum(parts)
    shares = sum(part**2 / freedom for part, (_, freedom) in zip(parts, noises, strict=True))
    around = sqrt(total) * float(stdtrit(total**2 / shares, (1 + confidence) / 2)) if total else 0.0
    return Estimate(middle, middle - around, middle + around).exp()


@dataclass(frozen=True)
class Place:
    """What an optimizer and a batch need to come to a loss."""

    batch: float
    devices: int
    seconds: float


def pareto(places: Sequence[Place]) -> list[Place]:
    """Return those that no other beats: none is as fast or faster with as few or fewer devices; by devices."""
    found: list[Place] = []
    for place in sorted(places, key=lambda one: (one.devices, one.seconds)):
        if not found or place.seconds < found[-1].seconds:
            found.append(place)
    return found


def branched_critical(losses: Mapping[float, float], epsilon: float = EPSILON) -> float:
    """Return the critical batch out of branches with more and more batch, all trained on the same tokens.

    It is the largest whose loss is at most epsilon above the best of the smaller ones, as are all below it: one that
    comes back by chance behind one that does not counts for nothing.

    Args:
        losses: at the end of each branch, by batch; NaN or infinite where it diverged.
        epsilon: nats.
    """
    ordered = sorted(losses)
    critical, best = ordered[0], losses[ordered[0]]
    for batch in ordered[1:]:
        if not losses[batch] <= best + epsilon:
            break
        critical, best = batch, min(best, losses[batch])
    return critical


@dataclass(frozen=True)
class Growth:
    """From when on a batch holds."""

    tokens: float
    batch: int
    rate_factor: float
    """Of the learning rate at the smallest batch: the root of how much larger this one is."""


def batch_schedule(critical: Mapping[float, float], smallest: int) -> list[Growth]:
    """Return when the batch doubles: where the critical one is above twice its own (arXiv 2505.23971).

    Args:
        critical: batch, by the tokens after which it was found.
        smallest: batch with which training begins.
    """
    found = [Growth(0.0, smallest, 1.0)]
    for tokens, batch in sorted(critical.items()):
        now = found[-1].batch
        while batch > 2 * now:
            now *= 2
        if now > found[-1].batch:
            found.append(Growth(tokens, now, sqrt(now / smallest)))
    return found
