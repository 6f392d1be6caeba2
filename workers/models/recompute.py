"""Layers of which the backward pass computes again what the forward pass did not keep: a layer then keeps its input.

What a layer counts or watches it does the first time alone: see `recomputing`.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch.utils.checkpoint import checkpoint

from workers.models.language_model import LanguageModel

_here = threading.local()  # The backward pass of a GPU runs on a thread of its own.


def recomputing() -> bool:
    """Tell whether this is a forward pass that was there before."""
    return getattr(_here, "again", False)


@contextmanager
def _again() -> Iterator[None]:
    _here.again = True
    try:
        yield
    finally:
        _here.again = False


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _again()


def recompute(model: LanguageModel, layers: int) -> None:
    """Have the first so many layers of a model computed again in the backward pass."""
    for block in model.blocks[:layers]:
        # Nothing here is random, and the state of random numbers would be read for each layer.
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
        block.forward = again
