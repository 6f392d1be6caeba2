"""The feed-forward layers' products, and the way of tokens to their experts and back: no copy and no pass too many.

Torch's autograd would keep a SwiGLU's product with the gate and what comes of it, write the gradient of experts'
weights `[E, in, out]` and copy it into `[E, out, in]`, and add up the gradients of permuted rows one by one. Here what
costs no product is computed again, gradients are written as the weights lie, and a token's rows are summed in the order
of its experts: bitwise the same every time, with neither an indexed addition nor a second sort.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.models.kernels import Cost, Kernel, compiled
from workers.work import Work, elementwise, nbytes_of, product


def _opaque(fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a function of tensors an op that torch's compiler does not look into, of its name and with this fake form.

    `torch.library.custom_op` makes such ones, too, but they import the compiler at their first call: 1.5 s, for nothing
    where nothing is compiled. Autograd does not know the op, so it is called within an `autograd.Function`.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = f"raymuon::{function.__name__}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", function)
        torch.library.register_fake(name, fake)
        return getattr(torch.ops.raymuon, function.__name__)

    return register


# Torch's own fake form has the checks of a GPU's kernel, and refuses fp32, which a CPU's takes.
def _fake_rows_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    whole = x.dtype == torch.bfloat16
    return F.grouped_mm(x, weights, offs=ends) if whole else x.new_empty(len(x), weights.size(2))


def _fake_stacked_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    whole = a.dtype == torch.bfloat16
    return F.grouped_mm(a.mT, b, offs=ends) if whole else a.new_empty(len(ends), a.size(1), b.size(1))


@_opaque(_fake_rows_product)
def rows_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return rows `[rows, k]`, of expert e up to `ends[e]`, times their experts' matrices `[experts, k, n]`."""
    return F.grouped_mm(x, weights, offs=ends)


@_opaque(_fake_stacked_product)
def stacked_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return `a^T b` of each expert's rows `[rows, m]` and `[rows, n]`: `[experts, m, n]`, 0 where it has none."""
    return F.grouped_mm(a.mT, b, offs=ends)


def work_of_grouped(kind: str, experts: int, rows: int, k: int, n: int, itemsize: int) -> Work:
    """Return what a grouped product does: each expert has as many rows as any other.

    A GPU does all of them in one call, a CPU one after the other.
    """
    each = max(1, rows // experts)
    return product(experts, each, k, n, itemsize, parts=1 if kind == "cuda" else experts)


def work_of_stacked(kind: str, experts: int, m: int, rows: int, n: int, itemsize: int) -> Work:
    """Return what a product `[m, rows] x [rows, n]` of each expert's rows does."""
    return product(experts, m, max(1, rows // experts), n, itemsize, parts=1 if kind == "cuda" else experts)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights, ends)
        return rows_product(x, weights.mT, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x, weights, ends), gradient = ctx.saved_tensors, gradients[0].contiguous()
        return rows_product(gradient, weights, ends), stacked_product(gradient, x, ends), None


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return rows times their experts' matrices, transposed as `F.linear` has it.

    Args:
        x: `[rows, in]`, sorted by expert; expert e has the rows up to `ends[e]`.
        weights: `[experts, out, in]`; their gradient lies likewise.
        ends: int32 `[experts]`.

    Returns:
        `[rows, out]`.
    """
    return _GroupedProduct.apply(x, weights, ends)


def plain_swiglu(gate: Tensor, up: Tensor, scale: Tensor | None) -> Tensor:
    """Return `silu(gate) * up`, times `scale` for each row."""
    h = F.silu(gate) * up
    return h if scale is None else h * scale


def plain_swiglu_gradients(
    gradient: Tensor, gate: Tensor, up: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `swiglu` once more, and the gradients with respect to its arguments."""
    activated = F.silu(gate)
    h, of_scale = activated * up, None
    if scale is not None:
        of_scale = (gradient * h).sum(-1, keepdim=True)
        h, gradient = h * scale, gradient * scale
    return h, torch.ops.aten.silu_backward(gradient * up, gate), gradient * activated, of_scale


class _SwiGLUProduct(torch.autograd.Function):
    """Keeps gate and up, and computes what the last product was made with again."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, scale: Tensor | None, weight: Tensor, ends: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate, up, scale, weight, ends)
        h = compiled(plain_swiglu, gate)(gate, up, scale)
        return F.linear(h, weight) if ends is None else rows_product(h, weight.mT, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gate, up, scale, weight, ends), gradient = ctx.saved_tensors, gradients[0].contiguous()
        of_h = torch.matmul(gradient, weight) if ends is None else rows_product(gradient, weight, ends)
        h, of_gate, of_up, of_scale = compiled(plain_swiglu_gradients, gate)(of_h, gate, up, scale)
        del of_h
        if ends is None:
            of_weight = torch.mm(gradient.flatten(0, -2).mT, h.flatten(0, -2))
        else:
            of_weight = stacked_product(gradient, h, ends)
        return of_gate, of_up, of_scale, of_weight, None


def lean_swiglu_product(
    gate: Tensor, up: Tensor, weight: Tensor, scale: Tensor | None = None, ends: Tensor | None = None
) -> Tensor:
    """Return `swiglu_product`, and keep of it gate and up alone."""
    return _SwiGLUProduct.apply(gate, up, scale, weight, ends)


def _swiglu_product(
    gate: Tensor, up: Tensor, weight: Tensor, scale: Tensor | None = None, ends: Tensor | None = None
) -> Tensor:
    # A CPU takes 3 % longer to compute SwiGLU again, op by op; torch.compile finds by itself what to keep.
    if gate.is_cuda and not torch.compiler.is_compiling():
        return lean_swiglu_product(gate, up, weight, scale, ends)
    h = plain_swiglu(gate, up, scale)
    return F.linear(h, weight) if ends is None else grouped_product(h, weight, ends)


def _cost_of_swiglu_product(
    kind: str, gate: Tensor, up: Tensor, weight: Tensor, scale: Tensor | None = None, ends: Tensor | None = None
) -> Cost | None:
    """A GPU computes SwiGLU in one pass, and its gradients in another; a CPU op by op."""
    if kind == "cpu":
        return None
    rows, (out, inner), nbytes = gate.numel() // gate.size(-1), weight.shape[-2:], nbytes_of(gate)
    result = gate.new_empty((*gate.shape[:-1], out))

    experts, itemsize = (1 if ends is None else len(ends)), gate.element_size()
    return Cost(
        result,
        tuple(one for one in (gate, up, scale, weight, ends) if one is not None),
        (elementwise(3 * nbytes), work_of_grouped(kind, experts, rows, inner, out, itemsize)),
        (
            work_of_grouped(kind, experts, rows, out, inner, itemsize),
            elementwise(6 * nbytes),
            work_of_stacked(kind, experts, out, rows, inner, itemsize),
        ),
        working=(torch.empty_like(gate),),
    )


swiglu_product = Kernel(_swiglu_product, _cost_of_swiglu_product)
"""`W (silu(gate) * up * scale)`: gate and up `[..., in]`, the weight `[out, in]` and no `ends`; or rows sorted by
expert with the weights `[experts, out, in]`, whose scale, `[rows, 1]`, is applied here, on the narrow side."""


@dataclass(frozen=True)
class Routes:
    """Which rows go to which expert: `top_k` rows for each token, sorted by expert, a token's in order of tokens."""

    order: Tensor
    """Of each sorted row, its place when rows lie token by token, int64 `[tokens * top_k]`."""
    inverse: Tensor
    """Of each row token by token, its place when sorted."""
    counts: Tensor
    """Rows of each expert, int64."""
    ends: Tensor
    """Where each expert's rows end, int32."""
    top_k: int

    @staticmethod
    def of(chosen: Tensor, experts: int) -> "Routes":
        """Sort.

        Args:
            chosen: the experts of each token, int64 `[tokens, top_k]`.
            experts: how many there are.
        """
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = rows_of_each(flat, experts, torch.ones_like(flat))
        return Routes(order, inverse, counts, counts.cumsum(0).to(torch.int32), chosen.size(1))

    def rows_of(self, x: Tensor) -> Tensor:
        """Return each token's row `[tokens, width]` for each of its experts, sorted: `[tokens * top_k, width]`."""
        return _Spread.apply(x, self.order // self.top_k, self.inverse, self.top_k)

    def sorted(self, x: Tensor) -> Tensor:
        """Return what each token has for each of its experts, `[tokens, top_k]`, sorted: `[tokens * top_k, 1]`."""
        return _Spread.apply(x.reshape(-1, 1), self.order, self.inverse, 1)

    def summed(self, rows: Tensor) -> Tensor:
        """Return the sum of each token's rows, `[tokens, width]`."""
        return _Gather.apply(rows, self.order // self.top_k, self.inverse, self.top_k)


def rows_of_each(chosen: Tensor, experts: int, weights: Tensor) -> Tensor:
    """Return how many rows each expert has, int64 `[experts]`.

    Args:
        chosen: the expert of each row, int64.
        experts: how many there are.
        weights: of each row, int64; 0 where it does not count.
    """
    return torch.zeros(experts, dtype=torch.int64, device=chosen.device).scatter_add_(0, chosen, weights)


def _sum_of_rows(rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    gathered = rows.index_select(0, inverse)
    return gathered if top_k == 1 else gathered.unflatten(0, (-1, top_k)).sum(1)


def _cost_of_sum(kind: str, rows: Tensor, inverse: Tensor, top_k: int) -> Cost | None:
    """A GPU reads each row once and writes the sums; a CPU writes the gathered rows first."""
    if kind == "cpu" or top_k == 1:
        return None
    result = rows.new_empty(len(rows) // top_k, rows.size(1))
    moved = float(nbytes_of(rows) + nbytes_of(result))
    return Cost(result, (), (Work("gather", moved, moved, moved),), ())


_summed = Kernel(lambda rows, *rest: compiled(_sum_of_rows, rows)(rows, *rest), _cost_of_sum)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _summed(gradients[0], ctx.saved_tensors[0], ctx.top_k), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place)
        return _summed(rows, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None, None
