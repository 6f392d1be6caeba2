"""What ops return of tensors without data, remembered: a model's layers call the same ones on the same shapes.

torch works shapes out in Python, at a third of a millisecond for an op; an answer that is known takes a hundredth. What
is remembered follows from the op, from shapes, strides, types and plain arguments, and from nothing else. A result is
made again where all of its memory is new; views, and what is changed in place, are always torch's own.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Fresh:
    """Tensors of their own memory, to be made again."""

    layouts: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    """Sizes, strides and type of each."""
    alone: bool
    """It is one tensor, and not a tuple."""

    def make(self) -> tuple[Tensor, ...]:
        """Return new ones."""
        return tuple(
            torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in self.layouts
        )


def question_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Hashable | None:
    """Return what a call's result depends on; None where it may depend on more."""
    try:
        return func, _key(args), _key(tuple(kwargs.items()))
    except _HasMore:
        return None


def fresh_of(result: Any, given: Sequence[Tensor]) -> Fresh | None:
    """Return how to make a result again; None where that is not all of it."""
    made = (result,) if isinstance(result, Tensor) else result
    if type(made) is not tuple or not all(isinstance(one, Tensor) and _plain(one) for one in made):
        return None
    fresh = Fresh(tuple((one.shape, one.stride(), one.dtype) for one in made), alone=made is not result)
    memory = {one.untyped_storage()._cdata for one in (*made, *given)}
    others = {one.untyped_storage()._cdata for one in given}
    if len(memory) != len(made) + len(others):  # Some share memory.
        return None
    again = fresh.make()
    sizes = [[one.untyped_storage().nbytes() for one in tensors] for tensors in (made, again)]
    return fresh if sizes[0] == sizes[1] else None


class _HasMore(Exception):
    """A result may depend on more than shapes."""


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        if not _plain(value):
            raise _HasMore
        return value.dtype, value.shape, value.stride()
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return type(value), value  # 1, 1.0 and True are equal, and make results of different types.


def _plain(tensor: Tensor) -> bool:
    return tensor.is_meta and type(tensor) in (Tensor, Parameter)
