"""Which positions attention may look at, made once for a micro-batch and used by every layer.

Invariant: a position sees itself and those before it back to the beginning of its document, so no row of scores is
empty. Whether two positions share a document is asked of where documents begin, never of their numbers: a number that
comes again behind another one is another document. One number alone means something: NOBODY's tokens fill a sequence
up, and nothing is counted of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from workers.common.documents import NOBODY


class DocumentMask:
    """Causal attention within documents.

    Args:
        documents: of each position, any integers `[batch, time]`; a document ends where the number changes.
    """

    def __init__(self, documents: Tensor) -> None:
        place = torch.arange(documents.size(1), device=documents.device).expand(documents.shape)
        begins = torch.zeros_like(place)
        begins[:, 1:] = place[:, 1:] * (documents[:, 1:] != documents[:, :-1])
        self.starts = begins.cummax(1).values
        """The place at which each position's document begins, int64 `[batch, time]`."""
        self.positions = place - self.starts
        """Counted from that, int64 `[batch, time]`."""
        self.real = documents != NOBODY
        """Whether a position is of a document, bool `[batch, time]`."""
        self._added: dict[torch.dtype, Tensor] = {}
        self._blocks: Any = None

    def added(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores, `[batch, 1, time, time]`: 0 where a query may look, else minus infinity."""
        if dtype not in self._added:
            place = torch.arange(self.starts.size(1), device=self.starts.device)
            hidden = (place > place.unsqueeze(1)) | (place < self.starts.unsqueeze(-1))
            scores = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self._added[dtype] = scores.masked_fill_(hidden, -torch.inf).unsqueeze(1)
        return self._added[dtype]

    def blocks(self) -> Any:
        """Return the same for FlexAttention, which leaves out the blocks in which nobody may look at anything."""
        if self._blocks is None:
            (batch, time), starts = self.starts.shape, self.starts

            def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (query >= key) & (key >= starts[b, query])

            self._blocks = create_block_mask(visible, batch, None, time, time, device=starts.device)
        return self._blocks


@functools.lru_cache(maxsize=4)
def causal_blocks(time: int, device: torch.device) -> Any:
    """Return FlexAttention's mask of sequences that are one document each."""
    return create_block_mask(lambda b, h, query, key: query >= key, None, None, time, time, device=device)


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    """Return FlexAttention as one kernel; without being compiled it writes all scores."""
    return torch.compile(flex_attention, dynamic=False)
