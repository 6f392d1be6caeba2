"""How near two computations of one thing come where nothing lies between them but rounding: where tolerances are made.

Another processor sums in another order, and so does another world size. What that does is bounded by the precision, by
the size of what is compared, and by how much the computation enlarges a change of what goes in. A case that enlarges
it without bound compares nothing: AdamW divides each gradient by its own size, so where that is rounding alone, the
weight goes either way by the whole learning rate. Trainings that are compared take ADAMW_EPS.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

EPS = 2.0**-23
"""From 1 to the next number of fp32."""
ROUNDINGS = 8
"""As many of them, all in one direction, are allowed. Measured in Newton-Schulz, the worst: 1.1 in the standard form,
3.1 in the gram form, which squares a matrix before it enlarges what is small in it."""
ADAMW_EPS = 1e-3
"""About as large as a gradient in the tests: an update then goes with its gradient's size. So a wrong factor shows,
which AdamW hides otherwise, and rounding does not."""


def gain(polynomials: Sequence[tuple[float, float, float]]) -> float:
    """Return by how much Newton-Schulz enlarges the smallest singular values, and the rounding beside them."""
    return prod(slope for slope, _, _ in polynomials)


def assert_close(found: Tensor, exact: Tensor, enlarged: float = 1.0, name: str = "") -> None:
    """Assert that `found` is `exact` but for rounding, by the norm over all elements.

    Args:
        found: what fp32 made.
        exact: the same in fp64, or in fp32 in another order.
        enlarged: how much the computation enlarges a relative change of what goes in.
        name: of what is compared.
    """
    _assert_within(found, exact, enlarged * exact.double().norm(), name)


def assert_close_weights(found: Tensor, exact: Tensor, before: Tensor, enlarged: float = 1.0, name: str = "") -> None:
    """Assert that a weight is `exact` but for rounding: of itself when it is written, and in the way from `before`."""
    size = exact.double().norm() + enlarged * (exact.double() - before.double()).norm()
    _assert_within(found, exact, size, name)


def _assert_within(found: Tensor, exact: Tensor, size: Tensor, name: str) -> None:
    apart, allowed = (found.double() - exact.double()).norm().item(), (ROUNDINGS * EPS * size).item()
    assert torch.isfinite(found).all() and apart <= allowed, f"{name}: {apart:.2e} apart, rounding makes {allowed:.2e}"
