"""Which parameter goes to which method: the one place that decides it.

Muon takes every hidden matrix, the router's included, and every expert as a matrix of its own; AdamW takes embeddings,
head and norms (Moonlight, section 2.2). A parameter is in exactly one group.
"""

import math
from collections.abc import Iterable

from torch import nn

ADAMW_MODULES = ("embed_tokens", "lm_head")
"""Modules whose matrices are tables of vectors, not maps between hidden spaces."""


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether the parameter `name` of this shape is one matrix `[A, B]` or a stack of them `[E, A, B]`."""
    return len(shape) >= 2 and not any(module in name.split(".") for module in ADAMW_MODULES)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return `(E, A, B)`: how many matrices a parameter of this shape holds, and their rows and columns."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: str) -> list[dict]:
    """Split the trainable parameters into optimizer groups: `muon` (if there are matrices for it) and `adamw`.

    Args:
        named_parameters: of the module, in its own order, which fixes the flat layout of every group.
        optimizer: `muon` or `adamw`.

    Returns:
        torch parameter groups with the extra keys `method` and `names`.
    """
    groups = {method: {"method": method, "names": [], "params": []} for method in ("muon", "adamw")}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            method = "muon" if optimizer == "muon" and is_matrix(name, tuple(parameter.shape)) else "adamw"
            groups[method]["names"].append(name)
            groups[method]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
