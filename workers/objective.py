"""What is learned: the token that each position predicts, which of these targets count, and the loss that comes of it.

Training, validation, the plan and the benches ask here. A model gives hidden states; the loss takes them and the head's
weight, so that nobody else needs logits.

Invariant: whatever is said per token is divided by the number of targets that count, which is counted over all ranks,
and never taken as batch times length.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.cross_entropy import chunked_cross_entropy

IGNORED = -100
"""In the place of a target that does not count."""


@dataclass(frozen=True)
class Batch:
    """What is put in and what has to come out, of a few sequences."""

    inputs: Tensor
    """Tokens, int64 `[batch, time]`."""
    targets: Tensor
    """The token that each position predicts, int64 `[batch, time]`; IGNORED where it does not count."""
    documents: Tensor | None = None
    """Of each position, int32 `[batch, time]`, as a model takes them; None: each sequence is one."""

    @property
    def given(self) -> tuple[Tensor, ...]:
        """What a model is called with."""
        return (self.inputs,) if self.documents is None else (self.inputs, self.documents)

    @property
    def counted(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORED).sum())

    def without_targets(self) -> "Batch":
        """Return the same of which nothing counts: its loss is 0, and its gradient, too."""
        return Batch(self.inputs, torch.full_like(self.targets, IGNORED), self.documents)

    def to(self, device: torch.device) -> "Batch":
        """Return it on a device."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), documents)


def batch_of(tokens: Tensor, counts: Tensor | None = None, documents: Tensor | None = None) -> Batch:
    """Return what is learned from sequences: every token predicts the one after it.

    Args:
        tokens: int64 `[batch, time + 1]`.
        counts: which of them count where they are the target, bool in the same shape; None: all.
        documents: the document of each, int32 in the same shape; a document's first token then is no target, for what
            comes before it belongs to another. None: each sequence is one.
    """
    targets = tokens[:, 1:]
    if counts is not None:
        targets = targets.masked_fill(~counts[:, 1:], IGNORED)
    if documents is None:
        return Batch(tokens[:, :-1], targets)
    targets = targets.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORED)
    return Batch(tokens[:, :-1], targets, documents[:, :-1])


def summed_loss(hidden: Tensor, head: Tensor, targets: Tensor, chunked: bool = False) -> Tensor:
    """Return the cross-entropy of the targets that count, summed, in nats and fp32; 0 where none does.

    Args:
        hidden: states of the last layer, after its norm, `[batch, time, hidden]`.
        head: weight of the output layer, `[vocabulary, hidden]`.
        targets: of a `Batch`.
        chunked: never have all logits at once; the gradient is then computed on the way, once.
    """
    if chunked:
        return chunked_cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), IGNORED)
    logits = F.linear(hidden, head)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def gradient_weight(counted: int, world_size: int) -> float:
    """Return by what a rank multiplies a summed loss so that the gradient is that of the mean over the global batch.

    Args:
        counted: targets that count in the global batch, over all ranks.
        world_size: ranks, over which DeepSpeed averages.
    """
    return world_size / counted
