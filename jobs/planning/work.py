"""What a training step computes, as a list of ops with their sizes: the real model's code, run without data.

The model runs forward and backward on torch's meta device, so shapes are real and nothing is computed. Every op that is
called is noted with its operations and the bytes that it reads and writes, and every tensor's memory from its birth to
its end, so that the peak is that of the real order of events. What depends on data takes the balanced case: each
expert gets as many tokens as any other.

Three functions are met before torch takes them apart, as the kernels that devices have for them are not what the meta
device would show: attention, grouped products and, on a GPU, RMSNorm.
"""

import functools
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workers.calibrate import causal_keys, harmonic
from workers.config import ModelConfig
from workers.models import build_empty
from workers.models.attention import watch
from workers.objective import batch_of, summed_loss

aten = torch.ops.aten
_SPECIAL = {
    *(aten.silu, aten.silu_backward, aten.sigmoid, aten.exp, aten.rsqrt, aten.cos, aten.sin, aten._log_softmax),
    *(aten._log_softmax_backward_data, aten._softmax, aten._softmax_backward_data, aten._safe_softmax),
}
"""Functions of elements that cost more than a product of two."""
_GATHER = {
    *(aten.index, aten.index_put, aten._index_put_impl_, aten.embedding, aten.embedding_dense_backward),
    *(aten.gather, aten.scatter_add, aten.scatter_add_, aten.sort, aten.topk, aten.index_select),
}
_UNTOUCHED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
"""Their results' memory is taken, but neither read nor written."""
_META_ONLY = {torch.ops.prim.device}
"""Questions that tensors without data are asked."""

HEAP_BLOCK = 32 * 1024**2
"""Larger blocks go back to the system when they are freed, smaller ones stay with the process once it has freed some:
the largest that glibc's threshold for `mmap` gets by itself (`mallopt`, M_MMAP_THRESHOLD)."""


@dataclass(frozen=True, slots=True)
class Work:
    """An op as a device sees it."""

    kind: str
    """One of `workers.calibrate.KINDS`, or `call` where nothing but the call costs anything."""
    amount: float = 0.0
    """Operations of a product or of attention; bytes read and written of anything else."""
    size: float = 0.0
    """Its place on the curve of its kind."""
    nbytes: float = 0.0
    """Read and written."""
    parts: int = 1
    """In which it is computed one after the other within one call."""


Works = Counter[Work]
"""How often each is done."""


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch takes, forward and backward."""

    forward: Works
    backward: Works
    accumulation: Works
    """What every micro-batch of a step but the first does besides: its gradients are added to those that are there."""
    peak: int
    """Bytes of activations, logits and gradients at the worst moment, where there are no gradients before."""
    peak_beside_gradients: int
    """Bytes at the worst moment where all gradients are there: what is added to one of them is all that is new."""
    heap: int
    """Of `peak`, the bytes in blocks that a CPU's allocator keeps when they are freed."""
    heap_beside_gradients: int
    """Likewise, of `peak_beside_gradients` and the gradients."""


def elementwise(*nbytes: float) -> Work:
    """Return an op that reads and writes so many bytes."""
    total = float(sum(nbytes))
    return Work("elementwise", total, total, total)


def product(batch: int, m: int, k: int, n: int, itemsize: int, parts: int = 1) -> Work:
    """Return a batch of products `[m, k] x [k, n]`, each of `parts` like it."""
    return Work(
        "matmul",
        2.0 * batch * m * k * n,
        harmonic(max(m, 1), k, n),
        float(itemsize * batch * (m * k + k * n + m * n)),
        parts,
    )


class OpRecorder(TorchDispatchMode):
    """Notes the ops that are called within it, and the memory of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.works: Works = Counter()
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._events: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in made if self._is_fresh(tensor, given)]
        packet = func.overloadpacket
        if packet not in _META_ONLY:
            changed = made if func._schema.is_mutable else fresh
            self.works[_work_of(packet, given, changed, touched=packet not in _UNTOUCHED)] += 1
        for tensor in fresh:
            self._take(tensor.untyped_storage())
        return result

    def note(self, work: Work) -> None:
        """Note what a kernel of our own description does."""
        self.works[work] += 1

    def take_works(self) -> Works:
        """Return what was noted since the last call."""
        found, self.works = self.works, Counter()
        return found

    def peak(self, passing: Iterable[Tensor] = (), below: float = math.inf) -> int:
        """Return the bytes at the worst moment so far.

        Args:
            passing: tensors that count from their birth to that of the next of them, and not to their end.
            below: smaller blocks alone.
        """
        short = {self._numbers[tensor.untyped_storage()] for tensor in passing}
        live = peak = last = 0
        for number, nbytes in self._events:
            if abs(nbytes) >= below:
                continue
            if number in short:
                live, last = live - last, nbytes
            live += nbytes
            peak = max(peak, live)
        return peak

    def _is_fresh(self, tensor: Tensor, given: list[Tensor]) -> bool:
        storage = tensor.untyped_storage()._cdata
        return all(other.untyped_storage()._cdata != storage for other in given)

    def _take(self, storage: Any) -> None:
        if storage not in self._numbers:
            self._numbers[storage] = number = len(self._events)
            self._events.append((number, storage.nbytes()))
            weakref.finalize(storage, self._events.append, (number, -storage.nbytes()))


def _work_of(packet: Any, given: list[Tensor], made: list[Tensor], touched: bool) -> Work:
    if not made or not touched:
        return Work("call")
    itemsize = made[0].element_size()
    if packet in (aten.mm, aten.addmm):
        a, b = given[-2:]
        return product(1, a.shape[0], a.shape[1], b.shape[1], itemsize)
    if packet in (aten.bmm, aten.baddbmm):
        a, b = given[1:3] if packet is aten.baddbmm else given[:2]
        return product(a.shape[0], a.shape[1], a.shape[2], b.shape[2], itemsize)
    moved = float(sum(_nbytes(tensor) for tensor in (*given, *made)))
    if packet in _SPECIAL:
        return Work("special", moved, moved, moved)
    if packet in _GATHER:
        return Work("gather", moved, moved, moved)
    return Work("elementwise", moved, moved, moved)


def _nbytes(tensor: Tensor) -> int:
    """Return the bytes behind a tensor; what it repeats by a stride of zero lies there once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


class _Kernels(TorchFunctionMode):
    """Puts the devices' own kernels in the place of what the meta device would do."""

    def __init__(self, recorder: OpRecorder, cuda: bool) -> None:
        super().__init__()
        self.recorder, self.cuda = recorder, cuda

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (self.cuda or args[0].size(-1) == args[2].size(-1)):
            return _Attention.apply(*args, self.recorder, "cuda" if self.cuda else "cpu")
        if func is torch._grouped_mm:
            return _GroupedProduct.apply(*args[:2], self.recorder, self.cuda)
        if func is F.rms_norm and self.cuda:
            return _RmsNorm.apply(args[0], args[2] if len(args) > 2 else kwargs["weight"], self.recorder)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Causal attention in one kernel: the scores are never written, the backward pass computes them again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, recorder: OpRecorder, kind: str) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.size(-1)))
        sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.recorder = recorder
        ctx.kind = kind
        recorder.note(_attention("attention", 1.0, q, k, v, out, kind))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        q, k, v, out, _ = ctx.saved_tensors
        ctx.recorder.note(_attention("attention_backward", 2.5, q, k, v, out, ctx.kind))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def _attention(name: str, rounds: float, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kind: str) -> Work:
    batch, heads, time, _ = q.shape
    widths = q.size(-1) + v.size(-1)
    moved = float(rounds * sum(_nbytes(tensor) for tensor in (q, k, v, out)))
    work = rounds * 2.0 * batch * heads * time * causal_keys(time, kind) * widths
    return Work(name, work, harmonic(time, time, widths / 2), moved)


class _GroupedProduct(torch.autograd.Function):
    """Rows by experts: on a GPU one kernel, on a CPU one product after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, recorder: OpRecorder, cuda: bool) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.recorder, ctx.cuda = recorder, cuda
        experts, k, n = weights.shape
        return _grouped(recorder, cuda, experts, len(x), k, n, x, len(x), n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, weights = ctx.saved_tensors
        experts, k, n = weights.shape
        rows = x.size(0)
        to_x = _grouped(ctx.recorder, ctx.cuda, experts, rows, n, k, x, rows, k)
        to_weights = _grouped(ctx.recorder, ctx.cuda, experts, rows, k, n, weights, experts, k, n)
        return to_x, to_weights, None, None


def _grouped(
    recorder: OpRecorder, cuda: bool, experts: int, rows: int, k: int, n: int, like: Tensor, *shape: int
) -> Tensor:
    """Note the products of `rows / experts` rows with each expert's `[k, n]`, and return the empty result."""
    work = product(experts, max(1, rows // experts), k, n, like.element_size(), parts=1 if cuda else experts)
    recorder.note(work)
    return like.new_empty(shape)


class _RmsNorm(torch.autograd.Function):
    """The fused kernel of a GPU: one pass forward, which keeps the input and a number per row; two passes backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recorder: OpRecorder) -> Tensor:
        inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse)
        ctx.recorder = recorder
        recorder.note(elementwise(2 * _nbytes(x)))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        ctx.recorder.note(elementwise(4 * _nbytes(x)))
        return torch.empty_like(x), torch.empty_like(weight), None


@functools.lru_cache(maxsize=32)
def micro_batch_of(
    config: ModelConfig, micro_batch: int, seq_len: int, dtype: torch.dtype, cuda: bool, watched: bool = False
) -> MicroBatch:
    """Run the model without data and return what a micro-batch takes.

    Args:
        config: the model.
        micro_batch: sequences.
        seq_len: tokens of each.
        dtype: of the weights.
        cuda: with a GPU's kernels, not a CPU's.
        watched: attention's largest logits are kept, for which a CPU writes all scores.
    """
    with torch.device("meta"):
        model = build_empty(config).to(dtype)
        watch(model, watched and not cuda)
        tokens = torch.zeros(micro_batch, seq_len + 1, dtype=torch.int64)
    recorder = OpRecorder()
    with recorder, _Kernels(recorder, cuda):
        batch = batch_of(tokens)
        loss = summed_loss(model(batch.inputs), model.head, batch.targets)
        forward = recorder.take_works()
        loss.backward()
        del loss
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return MicroBatch(
        forward,
        recorder.take_works(),
        accumulation=Counter(elementwise(3 * gradient.nbytes) for gradient in gradients),
        peak=recorder.peak(),
        peak_beside_gradients=recorder.peak(gradients),
        heap=recorder.peak(below=HEAP_BLOCK),
        heap_beside_gradients=recorder.peak(gradients, HEAP_BLOCK)
        + sum(gradient.nbytes for gradient in gradients if gradient.nbytes < HEAP_BLOCK),
    )


@contextmanager
def recorded() -> Iterator[OpRecorder]:
    """Note what is called on tensors without data."""
    recorder = OpRecorder()
    with recorder:
        yield recorder
