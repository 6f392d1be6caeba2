"""Layers of which the backward pass computes again what the forward pass did not keep, but for attention's results.

A layer keeps its input, and of fused attention the output and a number for each query: small beside what they cost.
What a layer counts or watches it does the first time alone: see `recomputing`.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from workers.models.language_model import LanguageModel

aten = torch.ops.aten
KEPT = [
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
"""Ops whose results are kept: attention's."""

_here = threading.local()  # The backward pass of a GPU runs on a thread of its own.


def recomputing() -> bool:
    """Tell whether this is a forward pass that was there before."""
    return _pass() == "again"


def keeping() -> bool:
    """Tell whether this is a forward pass that will be there again."""
    return _pass() == "first"


def _pass() -> str:
    return getattr(_here, "number", "")


@contextmanager
def _marked(number: Literal["first", "again"], within: AbstractContextManager) -> Iterator[None]:
    before, _here.number = _pass(), number
    try:
        with within:
            yield
    finally:
        _here.number = before


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    first, again = create_selective_checkpoint_contexts(KEPT)
    return _marked("first", first), _marked("again", again)


def recompute(model: LanguageModel, layers: int) -> None:
    """Have the first so many layers of a model computed again in the backward pass."""
    for block in model.blocks[:layers]:
        # Nothing here is random, and the state of random numbers would be read for each layer.
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
        block.forward = again
