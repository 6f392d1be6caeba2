"""QK-Clip: after the update, shrink the queries and keys of heads whose attention logits have grown too large.

A head's factor is `min(1, threshold / largest logit)` (Kimi K2, arXiv 2507.20534, section 2.1, "MuonClip"). Where a
head has keys of its own, queries and keys take the square root of it each. Where heads share their keys, these are left
as they are and the queries take the whole factor: the rotary part of multi-head latent attention, and all of
grouped-query attention.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from optim.layout import Fragment


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of a projection that make queries or keys of one head."""

    name: str
    """Of the parameter `[rows, in]`."""
    first: int
    count: int
    head: int
    """Counted through all layers."""
    power: float
    """Of the factor: 1 where the other side is shared and stays, 1/2 where both sides take part."""


@dataclass(frozen=True, slots=True)
class HeadSlice:
    """`length` elements of a flat shard, from `offset` on, that scale with one head."""

    offset: int
    length: int
    head: int
    power: float


def slices_of(heads: Iterable[HeadRows], fragments: Iterable[Fragment], columns: Mapping[str, int]) -> list[HeadSlice]:
    """Return where the heads' rows lie in a shard that holds `fragments` of parameters with so many `columns`."""
    held = {fragment.name: fragment for fragment in fragments}
    slices = []
    for rows in heads:
        if (fragment := held.get(rows.name)) is None:
            continue
        width = columns[rows.name]
        start = max(fragment.start, rows.first * width)
        stop = min(fragment.stop, (rows.first + rows.count) * width)
        if start < stop:
            offset = fragment.offset + start - fragment.start
            slices.append(HeadSlice(offset, stop - start, rows.head, rows.power))
    return slices


def factors(max_logits: Sequence[float], threshold: float) -> dict[int, float]:
    """Return the factor of each head that is over the threshold.

    A logit that is not finite gives none: the gradient is not finite either, and the step is skipped.
    """
    return {
        head: threshold / logit for head, logit in enumerate(max_logits) if logit > threshold and math.isfinite(logit)
    }


def clip(shard: Tensor, slices: Iterable[HeadSlice], found: Mapping[int, float]) -> None:
    """Scale the slices of the heads in `found`, in place."""
    for part in slices:
        if part.head in found:
            shard[part.offset : part.offset + part.length].mul_(found[part.head] ** part.power)
