"""The kernels that devices have of their own, each beside what it costs.

A plan runs the model without data, on torch's meta device, which would show other ops than a device's kernel: all
scores of attention, say. So a kernel is one function that a `TorchFunctionMode` meets before torch takes it apart, and
that tells what it does and what it keeps; where a device has none, the ops that torch calls instead are the truth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from workers.models.masks import DocumentMask, compiled_flex
from workers.work import Work, elementwise, harmonic, nbytes_of, product

KEY_BLOCK = {"cpu": 512, "cuda": 128}
"""Keys of a block of torch's fused attention (`FlashAttentionKernel.cpp`: kvSplitSize), and of FlashAttention 2."""
NARROWEST_FUSED = 16
"""Width per head from which FlexAttention takes queries and values."""


@dataclass(frozen=True)
class Cost:
    """What one call does; its tensors have no data."""

    result: Tensor
    kept: tuple[Tensor, ...]
    """For the backward pass, beside the arguments."""
    forward: Work
    backward: tuple[Work, ...]


class Kernel:
    """A function of tensors, and what it costs.

    Args:
        run: the function; its tensors come first.
        cost: takes a kind of device, `cpu` or `cuda`, and the function's arguments; None where the device has no such
            kernel.
    """

    def __init__(self, run: Callable[..., Tensor], cost: Callable[..., Cost | None]) -> None:
        self.run, self.cost = run, cost

    def __call__(self, *arguments: Any) -> Tensor:
        """Compute it, or let a mode do so that is on."""
        if has_torch_function(arguments):
            return handle_torch_function(self, arguments, *arguments)
        return self.run(*arguments)


def causal_keys(time: int, kind: str) -> float:
    """Return the keys that the mean query of a fused causal attention meets: whole blocks, those ahead included.

    Args:
        time: tokens of a sequence.
        kind: of the device, `cpu` or `cuda`.
    """
    block = KEY_BLOCK[kind]
    return float(time) if time <= block else (time + block) / 2


def flexible(q: Tensor, v: Tensor) -> bool:
    """Tell whether FlexAttention takes these; torch has none for the CPU's backward."""
    return q.is_cuda and min(q.size(-1), v.size(-1)) >= NARROWEST_FUSED


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None = None) -> Tensor:
    grouped = q.size(1) != k.size(1)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if flexible(q, v):
        return compiled_flex()(q, k, v, block_mask=mask.blocks(), enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.added(q.dtype), enable_gqa=grouped)


def _cost_of_attention(kind: str, q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask | None = None) -> Cost | None:
    """The scores are never written, the backward pass computes them again; a CPU's kernel has one width for all.

    With a mask of documents a CPU's kernel reads the mask and leaves out no block, not even the future. A GPU's leaves
    out what lies in other documents; how much that is nobody knows before the data, so it costs what it does without.
    """
    if kind == "cpu" and q.size(-1) != v.size(-1):
        return None
    added = () if mask is None or kind != "cpu" else (mask.added(q.dtype),)
    (batch, heads, time, width), value_width = q.shape, v.size(-1)
    out = q.new_empty((*q.shape[:-1], value_width))
    sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
    amount = 2.0 * batch * heads * time * (time if added else causal_keys(time, kind)) * (width + value_width)
    size = harmonic(time, time, (width + value_width) / 2)
    moved = float(sum(nbytes_of(tensor) for tensor in (q, k, v, out)) + heads * sum(map(nbytes_of, added)))
    backward = Work("attention_backward", 2.5 * amount, size, 2.5 * moved)
    return Cost(out, (out, sums, *added), Work("attention", amount, size, moved), (backward,))


def _cost_of_grouped_product(kind: str, x: Tensor, weights: Tensor, ends: Tensor) -> Cost:
    """Each expert gets as many rows as any other; on a GPU one call, on a CPU one product after the other."""
    (experts, k, n), rows = weights.shape, max(1, len(x) // len(weights))

    def work(m: int, inner: int, columns: int) -> Work:
        return product(experts, m, inner, columns, x.element_size(), parts=1 if kind == "cuda" else experts)

    return Cost(x.new_empty(len(x), n), (), work(rows, k, n), (work(rows, n, k), work(rows, k, n)))


def _cost_of_rms_norm(kind: str, x: Tensor, weight: Tensor, eps: float) -> Cost | None:
    """A GPU's goes over its input once, and keeps a number for each row; the backward pass goes over it twice."""
    if kind == "cpu":
        return None
    inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return Cost(torch.empty_like(x), (inverse,), elementwise(2 * nbytes_of(x)), (elementwise(4 * nbytes_of(x)),))


@torch.library.custom_op("raymuon::grouped_product", mutates_args=())
def _grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weights, offs=ends)


@_grouped_product.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.size(-1))


@torch.library.custom_op("raymuon::grouped_outer_product", mutates_args=())
def _grouped_outer_product(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x.mT, grad, offs=ends)


@_grouped_outer_product.register_fake
def _(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), x.size(-1), grad.size(-1))


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weights, ends = ctx.saved_tensors
    return _grouped_product(grad, weights.mT, ends), _grouped_outer_product(x, grad, ends), None


_grouped_product.register_autograd(_backward, setup_context=_keep_for_backward)

attention = Kernel(_attend, _cost_of_attention)
"""Causal, of `[batch, heads, time, dim]`; several neighbouring query heads may share one of keys and values. A mask of
documents may come behind the tensors."""
grouped_product = Kernel(lambda x, weights, ends: _grouped_product(x, weights, ends), _cost_of_grouped_product)
"""Rows `[rows, k]`, of expert e up to `ends[e]`, times their experts' matrices `[experts, k, n]`."""
rms_norm = Kernel(lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps), _cost_of_rms_norm)
"""Over the last dimension, with gains."""
