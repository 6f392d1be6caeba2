"""What an op does as a device sees it: the currency in which kernels tell what they cost, and plans count."""

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

KINDS = ("matmul", "attention", "attention_backward", "elementwise", "special", "gather")
"""Of work: products, fused causal attention and its backward pass (operations per second); sums and products of
elements, functions such as exponentials, and reads at given rows (bytes per second)."""


@dataclass(frozen=True, slots=True)
class Work:
    """An op as a device sees it."""

    kind: str
    """One of `KINDS`, or `call` where nothing but the call costs anything."""
    amount: float = 0.0
    """Operations of a product or of attention; bytes read and written of anything else."""
    size: float = 0.0
    """Its place on the curve of its kind."""
    nbytes: float = 0.0
    """Read and written."""
    parts: int = 1
    """In which it is computed one after the other within one call."""


Works = Counter[Work]
"""How often each is done."""


def elementwise(*nbytes: float) -> Work:
    """Return an op that reads and writes so many bytes."""
    total = float(sum(nbytes))
    return Work("elementwise", total, total, total)


def product(batch: int, m: int, k: int, n: int, itemsize: int, parts: int = 1) -> Work:
    """Return a batch of products `[m, k] x [k, n]`, each of `parts` like it."""
    return Work(
        "matmul",
        2.0 * batch * m * k * n,
        harmonic(max(m, 1), k, n),
        float(itemsize * batch * (m * k + k * n + m * n)),
        parts,
    )


def harmonic(*sides: float) -> float:
    """Return the harmonic mean: the size of a product, as its memory traffic over its work is `sum(1 / side)`."""
    return len(sides) / sum(1 / side for side in sides)


def nbytes_of(tensor: Tensor) -> int:
    """Return the bytes behind a tensor; what it repeats by a stride of zero lies there once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()
