"""The cross-entropy without all logits at once: some tokens after the others, each time with the gradient.

Torch's own (`F.linear_cross_entropy` with options) returns the loss in the dtype of the states, and multiplies the
gradient by a factor in it: in bf16 a loss of three digits, and a learning rate that is off by up to 0.4 %.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.kernels import Cost, Kernel, compiled
from workers.work import elementwise, nbytes_of, product

ROWS = {"cpu": 256, "cuda": 1024}
"""Tokens whose logits are there at once: enough for products at full speed."""


def _of_logits(logits: Tensor, targets: Tensor, ignored: int, learns: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss in fp32 and, where it is learned from, the gradient in the dtype of the logits."""
    counts = (targets != ignored).unsqueeze(-1)
    places = targets.clamp(min=0).unsqueeze(-1)
    log_probabilities = F.log_softmax(logits, -1, dtype=torch.float32)
    loss = -log_probabilities.gather(1, places).masked_fill(~counts, 0.0).sum()
    if not learns:
        return loss, logits
    minus_one = torch.full_like(places, -1, dtype=torch.float32)
    gradient = log_probabilities.exp_().scatter_add_(1, places, minus_one).masked_fill_(~counts, 0.0)
    return loss, gradient.to(logits.dtype)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, ignored: int, learns: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden, of_head = (torch.empty_like(hidden), torch.zeros_like(head)) if learns else (None, None)
        rows = ROWS[hidden.device.type]
        for first in range(0, len(hidden), rows):
            here = slice(first, first + rows)
            logits = F.linear(hidden[here], head)
            loss, gradient = compiled(_of_logits, logits)(logits, targets[here], ignored, learns)
            total += loss
            if of_hidden is not None and of_head is not None:
                torch.mm(gradient, head, out=of_hidden[here])
                of_head.addmm_(gradient.mT, hidden[here])
            del logits, gradient  # Else they were there beside the next ones.
        ctx.gradients = of_hidden, of_head
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (of_hidden, of_head), ctx.gradients = ctx.gradients, None  # Once: they are changed in place.
        return of_hidden.mul_(gradients[0]), of_head.mul_(gradients[0]), None, None, None


def _chunked(hidden: Tensor, head: Tensor, targets: Tensor, ignored: int) -> Tensor:
    return _Chunked.apply(hidden, head, targets, ignored, torch.is_grad_enabled())


def _cost(kind: str, hidden: Tensor, head: Tensor, targets: Tensor, ignored: int) -> Cost:
    """Both gradients are there after the forward pass; a GPU goes over the logits in one kernel."""
    tokens, (vocabulary, width), itemsize = len(hidden), head.shape, hidden.element_size()
    rows = min(ROWS[kind], tokens)
    chunks, logits = -(-tokens // rows), rows * vocabulary
    of_hidden, of_head = torch.empty_like(hidden), torch.empty_like(head)
    working = [hidden.new_empty(logits), hidden.new_empty(logits, dtype=torch.float32 if kind == "cpu" else None)]
    products = (
        product(1, rows, width, vocabulary, itemsize),
        product(1, rows, vocabulary, width, itemsize),
        product(1, vocabulary, rows, width, itemsize),
    )
    passes = elementwise((4 * itemsize if kind == "cuda" else 24) * logits)
    return Cost(
        hidden.new_empty((), dtype=torch.float32),
        (of_hidden, of_head),
        (*products, passes) * chunks,
        (elementwise(2 * nbytes_of(hidden)), elementwise(2 * nbytes_of(head))),
        working=tuple(working),
        gradients=(of_hidden, of_head),
    )


chunked_cross_entropy = Kernel(_chunked, _cost)
"""Of hidden states `[tokens, hidden]`, the head `[vocabulary, hidden]` and targets `[tokens]`: the sum over those that
are not `ignored`, in nats and fp32. Its backward pass can run once."""
