"""What attention keeps of the tokens that were read, so that a text goes on without being read again.

A cache stands where training has a mask of documents: a model hands it to every layer, which puts down what it has of
the new tokens and gets all that is there. What that is each attention decides: keys and values, or the latents that
both come of. Memory is taken once, so a token costs no copy of those before it.

Invariant: what a sequence gives does not depend on the others. Shorter ones are padded behind their last token, where
nothing of theirs looks; the next token takes the padding's place.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.models.kernels import attention
from workers.models.masks import DocumentMask


class KeyValueCache:
    """Of some sequences, for every layer.

    Args:
        sequences: how many.
        capacity: tokens of each that there is room for.
        device: of the model.
    """

    def __init__(self, sequences: int, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.lengths, self.coming = [0] * sequences, [0] * sequences
        self._kept: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.positions = torch.empty(sequences, 0, dtype=torch.int64, device=device)
        """Of each token of this pass, int64 `[batch, time]`; also its place in the cache."""
        self.visible: Tensor | None = None
        """Where they look, bool `[batch, 1, time, end]`; None: everywhere, or in the first pass up to themselves."""

    def expect(self, counts: Sequence[int]) -> None:
        """Say before each forward pass how many tokens of each sequence it reads, one at least; the rest is padding.

        Raises:
            ValueError: there is no room for them, padding among them.
        """
        self.lengths = [length + count for length, count in zip(self.lengths, self.coming, strict=True)]
        self.coming, time = list(counts), max(counts)
        if max(self.lengths) + time > self.capacity:
            raise ValueError(f"{max(self.lengths)} and {time} more tokens are more than the cache's {self.capacity}")
        starts = torch.tensor(self.lengths, device=self.device)
        self.positions = starts.unsqueeze(1) + torch.arange(time, device=self.device)
        self.visible = None
        if not self.first and (time > 1 or self.ragged):  # A single token sees all that is there.
            self.visible = torch.arange(self.end, device=self.device) <= self.positions[:, None, :, None]

    @property
    def first(self) -> bool:
        """Whether nothing was read before this pass: then its own tokens are all that there is to look at."""
        return not any(self.lengths)

    @property
    def ragged(self) -> bool:
        """Whether the sequences have come to different lengths before this pass."""
        return len(set(self.lengths)) > 1

    @property
    def end(self) -> int:
        """The place behind the last one of this pass, padding among it."""
        return max(self.lengths) + self.positions.size(1)

    def extend(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Put down what a layer has of the tokens of this pass, and return what there is of all.

        Args:
            layer: whose they are.
            new: `[batch, heads, time, width]` each.

        Returns:
            `[batch, heads, end, width]` each, views of the cache.
        """
        if layer not in self._kept:
            # Zeros: what is never written has the weight 0, and 0 times what memory happens to hold may be NaN.
            self._kept[layer] = tuple(one.new_zeros(*one.shape[:2], self.capacity, one.size(3)) for one in new)
        for kept, one in zip(self._kept[layer], new, strict=True):
            if self.ragged:
                rows = torch.arange(len(self.lengths), device=self.device).unsqueeze(1)
                kept[rows, :, self.positions] = one.transpose(1, 2)
            else:
                kept[:, :, self.lengths[0] : self.end] = one
        return tuple(kept[:, :, : self.end] for kept in self._kept[layer])

    def attend(self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to all that was read, as `CausalAttention` does to a sequence, keeping keys and values."""
        keys, values = self.extend(layer, k, v)
        return attention(q, k, v) if self.first else self.attend_to(q, keys, values, q.size(-1) ** -0.5)

    def attend_to(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attend to what `extend` has returned; where query heads share one of keys, they are further queries of it.

        Args:
            q: `[batch, heads, time, dim]`.
            keys: `[batch, key heads, end, dim]`.
            values: `[batch, key heads, end, value dim]`.
            scale: of the scores.

        Returns:
            `[batch, heads, time, value dim]`.
        """
        group = q.size(1) // keys.size(1)
        queries = q.unflatten(1, (-1, group)).flatten(2, 3)  # [batch, key heads, group * time, dim]
        visible = None if self.visible is None else self.visible.repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scale)
        return out.unflatten(2, (group, -1)).flatten(1, 2)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences alone, in this order."""
        self.lengths = [self.lengths[row] for row in rows]
        self.coming = [self.coming[row] for row in rows]
        taken = torch.tensor(rows, device=self.device)
        self._kept = {layer: tuple(one[taken] for one in kept) for layer, kept in self._kept.items()}


Mask = DocumentMask | KeyValueCache
"""What says where a position looks."""
