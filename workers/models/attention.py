"""Causal attention that tells how large its logits are when it is watched, and computes none of them twice for it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest

from workers.models.cache import KeyValueCache, Mask
from workers.models.kernels import attention, flexible
from workers.models.masks import DocumentMask, causal_blocks, compiled_flex
from workers.models.recompute import recomputing

LARGE_LOGIT = 100.0
"""Logits above it are counted (Moonlight, section 3.4); Kimi K2 clips there."""


@dataclass(frozen=True)
class Logits:
    """What was seen of the attention logits."""

    largest: Tensor
    """Of each head, layer by layer: fp32 `[layers * heads]`; minus infinity where nothing was seen."""
    large: Tensor
    """Queries whose largest logit is above LARGE_LOGIT, over all heads: fp32, 0-dimensional."""
    queries: int
    """All of them."""


class CausalAttention(nn.Module):
    """The softmax attention of a layer, after its projections; scores are scaled by the root of the queries' width."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.watched = False
        self.forget(torch.device("cpu"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Attend; several neighbouring query heads may share one of keys and values.

        Args:
            q: `[batch, heads, time, dim]`.
            k: `[batch, key heads, time, dim]`.
            v: `[batch, key heads, time, value dim]`.
            mask: of the documents in the sequences; None: each is one. Or a cache with what comes before them.

        Returns:
            `[batch, heads, time, value dim]`.
        """
        if isinstance(mask, KeyValueCache):
            return mask.attend(self, q, k, v)
        if not (self.watched and self.training):
            return attention(q, k, v, mask)
        out, largest = (_flex if flexible(q, v) else _plain)(q, k, v, mask)
        if not recomputing():
            self._see(largest.detach().float(), mask)
        return out

    def forget(self, device: torch.device) -> None:
        """Begin anew, on the device of what will be seen."""
        self.largest = torch.full((self.heads,), -torch.inf, device=device)
        self.large, self.queries = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    # Into tensors, and neither a list nor a number: compiled code would be made anew for each length of it.
    def _see(self, largest: Tensor, mask: DocumentMask | None) -> None:
        if self.largest.device != largest.device:
            self.forget(largest.device)
        if mask is None:
            self.queries += largest.numel()
        else:  # What fills a sequence up is nobody's query.
            largest = largest.masked_fill(~mask.real.unsqueeze(1), -torch.inf)
            self.queries += self.heads * mask.real.sum()
        self.largest.copy_(torch.maximum(self.largest, largest.amax((0, 2))))
        self.large += (largest > LARGE_LOGIT).sum()


def watch(model: nn.Module, on: bool) -> None:
    """Have the attention of every layer keep the largest logits while it trains, or stop that."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for layer in _layers(model):
        layer.watched = on
        if layer.largest.device != device:
            layer.forget(device)


def take_logits(model: nn.Module) -> Logits:
    """Return what was seen since the last call, and forget it."""
    largest, large, queries = [], torch.zeros(()), 0
    for layer in _layers(model):
        largest.append(layer.largest)
        large = large.to(layer.large.device) + layer.large
        queries += int(layer.queries)
        layer.forget(layer.largest.device)
    return Logits(torch.cat(largest), large, queries)


def _layers(model: nn.Module) -> Iterator[CausalAttention]:
    return (module for module in model.modules() if isinstance(module, CausalAttention))


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None) -> tuple[Tensor, Tensor]:
    """Attend with all scores written out, `[batch * key heads, group * time, time]`; return each query's largest."""
    (batch, heads, time, dim), key_heads = q.shape, k.size(1)
    group = heads // key_heads
    if mask is None:
        hidden = torch.full((time, time), -torch.inf, dtype=q.dtype, device=q.device).triu_(1).repeat(group, 1)
    else:
        hidden = mask.added(q.dtype).unsqueeze(1).expand(-1, key_heads, group, -1, -1)
        hidden = hidden.reshape(batch * key_heads, group * time, time)
    queries = q.reshape(batch * key_heads, group * time, dim)
    scores = torch.baddbmm(hidden, queries, k.flatten(0, 1).mT, alpha=dim**-0.5)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    out = torch.bmm(weights, v.flatten(0, 1)).view(batch, heads, time, -1)
    return out, scores.detach().amax(-1).view(batch, heads, time)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None) -> tuple[Tensor, Tensor]:
    """Attend in one kernel, which has each query's largest logit anyway; torch has none for the CPU's backward."""
    out, aux = compiled_flex()(
        q,
        k,
        v,
        block_mask=causal_blocks(q.size(2), q.device) if mask is None else mask.blocks(),
        enable_gqa=q.size(1) != k.size(1),
        return_aux=AuxRequest(max_scores=True),
    )
    return out, aux.max_scores
