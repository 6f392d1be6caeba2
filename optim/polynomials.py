"""Which polynomials orthogonalize a matrix, in which form they are applied, and what that costs. Pure Python.

Every step maps each singular value s of a matrix X to `s (a + b s^2 + c s^4)` and leaves the singular vectors alone. A
few such quintics one after the other bring all singular values near 1. They can be applied in two forms, equal in exact
arithmetic:

- *standard*: `X <- (a + b R + c R^2) X` with the Gram matrix `R = X X'`, formed anew in every step;
- *gram*: the product Q of all polynomials is built from R alone, and X is multiplied once, at the end. The steps cost
  products of the shorter side only, which is less for matrices that are far from square (T. Dao et al., Gram
  Newton-Schulz, 2026).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Quintic = tuple[float, float, float]
"""a, b, c."""
CoefficientSet = Literal["quintic", "polar_express", "two_phase"]
Form = Literal["standard", "gram"]

JORDAN: Quintic = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's coefficients (Muon, 2024): steepest at zero; singular values end in about [0.7, 1.2]."""
CONVERGING: Quintic = (2.0, -1.5, 0.5)
"""Flat at 1: brings what is near there to it (the second phase of DeepSeek-V4)."""
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.28721201814563, -23.59588651909884, 17.30038731253093),
    (4.107059111542200, -2.947849916737909, 0.5448431082926601),
    (3.948690853482296, -2.908902115962949, 0.5518191394370135),
    (3.318419657370600, -2.488488024314874, 0.5100489401237203),
    (2.300652019954817, -1.668903984574750, 0.4188073119525674),
    (1.891301407787402, -1.267995827194594, 0.3768040894852514),
    (1.875001480832670, -1.250001645358391, 0.3750001645266451),
    (1.875, -1.25, 0.375),
)
"""Minimax quintics for singular values in [0.001, 1], each for the interval that the ones before leave; the last for
all further steps (N. Amsel et al., The Polar Express, arXiv 2505.16932, algorithm 2 with l = 1e-3 and their cushion).
"""
SAFETY = 1.01
"""Rounding may lift a singular value over 1, outside of which the minimax quintics grow fast: all but the last are
shrunk by this much (the same paper, section 4)."""


def coefficients(name: CoefficientSet, steps: int) -> tuple[Quintic, ...]:
    """Return the quintics of `steps` steps.

    Args:
        name: `quintic` repeats Jordan's; `polar_express` has one for each step; `two_phase` is Jordan's with two
            converging steps at the end.
        steps: 1 or more.
    """
    match name:
        case "quintic":
            return (JORDAN,) * steps
        case "two_phase":
            return (JORDAN,) * (steps - 2) + (CONVERGING,) * min(2, steps)
        case "polar_express":
            chosen = [*POLAR_EXPRESS, *[POLAR_EXPRESS[-1]] * (steps - len(POLAR_EXPRESS))][:steps]
            safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in chosen[:-1]]
            return (*safe, chosen[-1])


Precision = Literal["fp64", "fp32", "bf16", "fp16"]
GROWTH: dict[Precision, float] = {"fp64": 1e12, "fp32": 2.5e4, "fp16": 500.0, "bf16": 70.0}
"""How much the gram form may let the rounding of R grow: measured on matrices of low rank and of any condition."""


@cache
def restarts(polynomials: tuple[Quintic, ...], precision: Precision) -> tuple[int, ...]:
    """Return the steps before which the gram form multiplies X and forms R anew.

    Rounding leaves R with eigenvalues a little below zero where a matrix is short of rank. A step multiplies those near
    zero by a^2, and once they are far below zero the next ones blow them up.

    Args:
        polynomials: one for each step.
        precision: of the arithmetic.
    """
    found, growth = [], 1.0
    for step, (a, _, _) in enumerate(polynomials[:-1], 1):
        growth *= a * a
        if growth > GROWTH[precision]:
            found.append(step)
            growth = 1.0
    return tuple(found)


@dataclass(frozen=True)
class Products:
    """How many products orthogonalize a matrix X `[A, B]`, A <= B."""

    outer: int
    """X X', symmetric: A A B multiplications."""
    inner: int
    """A square matrix times X: A A B."""
    square: int
    """Of two square matrices, symmetric: A A A."""

    def operations(self, rows: int, columns: int, share: float = 1.0) -> float:
        """Return the floating-point operations; a multiplication and an addition are two.

        Args:
            rows: of the matrix.
            columns: of the matrix.
            share: of a symmetric product that is computed.
        """
        short, long = sorted((rows, columns))
        return 2 * short * short * ((share * self.outer + self.inner) * long + share * self.square * short)


def products(steps: int, form: Form, restarts: Sequence[int] = ()) -> Products:
    """Return what `steps` polynomials take.

    Args:
        steps: polynomials.
        form: in which they are applied.
        restarts: steps before which the gram form multiplies X and forms R anew.
    """
    if form == "standard":
        return Products(outer=steps, inner=steps, square=steps)
    stretches = 1 + len(restarts)
    # In each stretch: X X' and Q X; a square of R in every step; from the second step on one product for Q; and two for
    # R in every step but the last.
    return Products(outer=stretches, inner=stretches, square=steps + 3 * (steps - stretches))


def form_of(rows: int, columns: int, steps: int, restarts: Sequence[int] = (), share: float = 1.0) -> Form:
    """Return the form with fewer operations, if that share of a symmetric product is computed."""
    forms: tuple[Form, ...] = ("standard", "gram")
    return min(forms, key=lambda form: products(steps, form, restarts).operations(rows, columns, share))
