"""What this process sends in collectives, counted where torch.distributed dispatches them.

The bytes are those of the ring algorithms with which NCCL and gloo move large tensors (Patarasuk and Yuan 2009; NCCL's
`PERFORMANCE.md` of nccl-tests). What a library really sends may differ: small tensors go along trees, and gloo's reduce
is a ring reduce-scatter and a gather.
"""

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_RING = {
    "allreduce_": ("all_reduce", 2, 0),
    "_allgather_base_": ("all_gather", 1, 0),
    "allgather_": ("all_gather", 1, 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 1),
    "reduce_scatter_": ("reduce_scatter", 1, 1),
    "reduce_": ("reduce", 1, 0),
    "broadcast_": ("broadcast", 1, 0),
}
"""Of each op: the collective, how often the payload goes round the ring, and which argument is the whole payload."""
_ALL_TO_ALL = ("alltoall_base_", "alltoall_")
COLLECTIVES = (*dict.fromkeys(name for name, *_ in _RING.values()), "all_to_all")
"""Their names."""
_BARRIERS = ("barrier", "monitored_barrier_")


class Traffic(TorchDispatchMode):
    """Counts the collectives that are called within it.

    All-to-all is exact. Of the rest a rank sends (n - 1) / n of the payload, all-reduce twice that; in reduce and
    broadcast, where the ranks of a ring differ, it is the mean over the ranks.

    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        """Bytes that this rank sent, by collective."""
        self.calls: Counter[str] = Counter()
        """By collective."""
        self.uncounted: Counter[str] = Counter()
        """Calls of ops for which there is no formula here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and (op := func.overloadpacket.__name__) not in _BARRIERS:
            if op in _RING or op in _ALL_TO_ALL:
                collective, sent = _sent(op, args)
                self.sent[collective] += sent
                self.calls[collective] += 1
            else:
                self.uncounted[op] += 1
        return func(*args, **(kwargs or {}))


# Torch has its calls go by way of its compiler, whose import takes 1.5 s: in a step that is measured.
Traffic.__torch_dispatch__ = inspect.unwrap(Traffic.__torch_dispatch__)


def _sent(op: str, args: tuple) -> tuple[str, int]:
    """Return the collective that an op is, and the bytes that it makes this rank send."""
    group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
    rank, size = group.rank(), group.size()
    if op in _ALL_TO_ALL:
        parts = args[1] if op == "alltoall_" else args[1].split(args[4] or args[1].shape[0] // size)
        return "all_to_all", sum(part.nbytes for peer, part in enumerate(parts) if peer != rank)
    collective, rounds, payload = _RING[op]
    return collective, rounds * sum(tensor.nbytes for tensor in _tensors(args[payload])) * (size - 1) // size


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)
