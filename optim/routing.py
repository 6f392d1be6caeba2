"""Which parameter goes to which method: the one place that decides it.

Muon takes every hidden matrix, the router's included, and every expert as a matrix of its own; AdamW takes embeddings,
head and norms (Moonlight, section 2.2). A parameter is in exactly one group.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn


def is_matrix(name: str, shape: tuple[int, ...], tables: Collection[str]) -> bool:
    """Tell whether the parameter `name` of this shape is one matrix `[A, B]` or a stack of them `[E, A, B]`."""
    return len(shape) >= 2 and name not in tables


def matrices_in(shape: tuple[int, ...], parts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Return rows and columns of every matrix in a parameter, in the order in which they lie.

    Args:
        shape: of the parameter; `[E, A, B]` is a stack of E matrices.
        parts: rows of each matrix of its own within `[A, B]`; empty for one.

    Raises:
        ValueError: the parts are not all of its rows.
    """
    rows, columns = shape[-2:]
    if parts and sum(parts) != rows:
        raise ValueError(f"parts of {', '.join(map(str, parts))} rows do not make up {rows}")
    return [(part, columns) for part in parts or (rows,)] * math.prod(shape[:-2])


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: str,
    tables: Collection[str],
    parts: Mapping[str, Sequence[int]] | None = None,
) -> list[dict]:
    """Split the trainable parameters into optimizer groups: `muon` (if there are matrices for it) and `adamw`.

    Args:
        named_parameters: of the module, in its own order, which fixes the flat layout of every group.
        optimizer: `muon` or `adamw`.
        tables: names of parameters that are tables of vectors, not maps between hidden spaces.
        parts: rows of each matrix within a parameter, by name; those that are not named are one matrix.

    Returns:
        torch parameter groups with the extra keys `method`, `names` and, for each parameter, `matrices`.

    Raises:
        ValueError: a parameter is there twice, DeepSpeed would take it for its own Muon, tables or parts are wrong.
    """
    groups = {method: {"method": method, "names": [], "params": [], "matrices": []} for method in ("muon", "adamw")}
    seen: dict[int, str] = {}
    for name, parameter in named_parameters:
        if (first := seen.setdefault(id(parameter), name)) != name:
            raise ValueError(f"{name} is the same parameter as {first}; give each once")
        if hasattr(parameter, "use_muon"):
            raise ValueError(f"{name} has an attribute use_muon: DeepSpeed would orthogonalize it, too; remove it")
        if parameter.requires_grad:
            method = "muon" if optimizer == "muon" and is_matrix(name, tuple(parameter.shape), tables) else "adamw"
            shape = tuple(parameter.shape)
            matrices = matrices_in(shape, (parts or {}).get(name, ())) if method == "muon" else []
            groups[method]["names"].append(name)
            groups[method]["matrices"].append(matrices)
            groups[method]["params"].append(parameter)
    if unknown := {*tables, *(parts or {})} - set(seen.values()):
        raise ValueError(f"{', '.join(sorted(unknown))}: named as a table or in parts, and no parameter")
    return [group for group in groups.values() if group["params"]]
