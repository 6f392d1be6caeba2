"""The loss in parameters and tokens: `L = E + A N^-alpha + B D^-beta`.

Hoffmann et al. (arXiv 2203.15556, approach 3): Huber loss of the residuals of `ln L`, over a grid of starts. alpha and
beta are told apart by sizes that were trained on several numbers of tokens each, and by nothing else.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from jobs.study.fits.estimate import CONFIDENCE, Estimate, Unidentified
from jobs.study.fits.linear import Array
from jobs.study.fits.measured import interval
from jobs.study.fits.power_law import HUBER

LEAST_POINTS = 6
DRAWS = 100
_STARTS = tuple(product((0.2, 0.5), (0.2, 0.5), (0.3, 0.8), (0.2, 0.6)))
"""alpha, beta, the share of E in the lowest loss, and the share of the rest that N has."""


@dataclass(frozen=True)
class Point:
    """A run to the end of its schedule."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Surface:
    """The fitted law."""

    floor: Estimate
    alpha: Estimate
    beta: Estimate
    log_parameters_scale: float
    log_tokens_scale: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of a size on so many tokens."""
        of_size = np.exp(self.log_parameters_scale - self.alpha.value * np.log(parameters))
        of_tokens = np.exp(self.log_tokens_scale - self.beta.value * np.log(tokens))
        return float(self.floor.value + of_size + of_tokens)


def fit_surface(points: Sequence[Point], confidence: float = CONFIDENCE, draws: int = DRAWS) -> Surface:
    """Fit the law.

    Raises:
        Unidentified: too few points, or no two sizes with several budgets each, or no two budgets with several sizes.
    """
    _require(points)
    x = np.log([[point.parameters, point.tokens] for point in points])
    y, middle = np.log([point.loss for point in points]), x.mean(axis=0)
    fits = [_solved(x - middle, y, _start(x - middle, y, *start)) for start in _STARTS]
    best = min(fits, key=lambda fit: fit.cost)
    freedom = len(y) - 5
    residual = best.fun * HUBER
    deviation = np.sqrt(np.sum(residual**2) / freedom)
    rng = np.random.default_rng(0)
    scales = deviation * np.sqrt(freedom / rng.chisquare(freedom, (draws, 1)))
    drawn = np.array([_solved(x - middle, one, best.x).x for one in y + scales * rng.standard_normal((draws, len(y)))])
    floor, alpha, beta = (interval(float(best.x[i]), drawn[:, i], confidence) for i in (0, 1, 2))
    return Surface(
        floor=floor,
        alpha=alpha,
        beta=beta,
        log_parameters_scale=float(best.x[3] + best.x[1] * middle[0]),
        log_tokens_scale=float(best.x[4] + best.x[2] * middle[1]),
    )


def _require(points: Sequence[Point]) -> None:
    if len(points) < LEAST_POINTS:
        raise Unidentified(f"a law in parameters and tokens needs {LEAST_POINTS} points, not {len(points)}")
    tokens_of, sizes_of = defaultdict(set), defaultdict(set)
    for point in points:
        tokens_of[point.parameters].add(point.tokens)
        sizes_of[point.tokens].add(point.parameters)
    if sum(len(tokens) > 1 for tokens in tokens_of.values()) < 2:
        raise Unidentified(
            "alpha and beta cannot be told apart: each size was trained on one number of tokens; "
            "give two sizes or more several budgets"
        )
    if len(tokens_of) < 3 or len(sizes_of) < 3:
        raise Unidentified("a law in parameters and tokens needs three sizes and three numbers of tokens")


def _start(x: Array, y: Array, alpha: float, beta: float, floor: float, share: float) -> Array:
    least, above = floor * np.exp(y.min()), np.exp(y.mean()) - floor * np.exp(y.min())
    return np.array([least, alpha, beta, np.log(share * above), np.log((1 - share) * above)])


def _solved(x: Array, y: Array, start: Array) -> Any:
    """Minimize Huber's loss; residuals are in its unit."""

    def terms(of: Array) -> tuple[Array, Array]:
        return np.exp(of[3] - of[1] * x[:, 0]), np.exp(of[4] - of[2] * x[:, 1])

    def residuals(of: Array) -> Array:
        return (np.log(of[0] + sum(terms(of))) - y) / HUBER

    def jacobian(of: Array) -> Array:
        size, tokens = terms(of)
        slopes = np.stack([np.ones_like(size), -x[:, 0] * size, -x[:, 1] * tokens, size, tokens], axis=1)
        return slopes / (of[0] + size + tokens)[:, None] / HUBER

    bounds = ([0, 0, 0, -np.inf, -np.inf], [np.exp(y.min()), 5, 5, np.inf, np.inf])
    inside = np.clip(start, np.add(bounds[0], 1e-9), np.subtract(bounds[1], 1e-9))
    # Its own annotations take no function for the derivative.
    return least_squares(residuals, inside, jacobian, bounds=bounds, loss="huber", max_nfev=50)  # type: ignore[arg-type]
