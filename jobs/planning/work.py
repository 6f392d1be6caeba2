"""What a training step computes, as a list of ops with their sizes: the real model's code, run without data.

The model runs forward and backward on torch's meta device, so shapes are real and nothing is computed. Every op that is
called is noted with its operations and the bytes that it reads and writes, and every tensor's memory from its birth to
its end, so that the peak is that of the real order of events. What depends on data takes the balanced case: each
expert gets as many tokens as any other.

Kernels are met before torch takes them apart, as what devices have for them is not what the meta device would show;
what they do and keep is told by themselves (`workers/models/kernels.py`).
"""

import functools
import math
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.planning.remembered import Fresh, fresh_of, question_of
from workers.config import ModelConfig
from workers.models import build_empty
from workers.models.attention import watch
from workers.models.feed_forward import work_of_grouped, work_of_stacked
from workers.models.kernels import Cost, Kernel, attention, stand_in
from workers.models.recompute import keeping, recompute, recomputing
from workers.objective import batch_of, summed_loss
from workers.work import Work, Works, elementwise, nbytes_of, product

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
_KNOWN: dict[Hashable, tuple[Fresh | None, Work]] = {}
"""What an op returns (None: torch is asked) and what it does, by the kind of device and what it depends on."""


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
    blocks: "Blocks"
    """Of a CPU, where there are no gradients before."""
    blocks_beside_gradients: "Blocks"
    """Of a CPU, with all gradients there."""
    blocks_of_bucket: "Blocks"
    """Of a CPU whose gradients go into a bucket as they come: a large block, of which a page is found when it is
    written."""


@dataclass(frozen=True)
class Blocks:
    """Bytes of a CPU's blocks at the worst moment of each kind."""

    small: int
    """Of the blocks that the heap keeps when they are freed."""
    fitting: int
    """Of these and of those that the heap has room for when it is empty."""
    large: int
    """Of the blocks that go back to the system."""

    @property
    def heap(self) -> int:
        """Return what the heap grows to, without holes.

        It is there, empty, when a step begins, but for the first. Large blocks that come first take what room it has,
        and it grows by as much for the small ones that come after.
        """
        return self.small + min(self.small, self.fitting - self.small)


class OpRecorder(TorchDispatchMode):
    """Notes the ops that are called within it on a kind of device, and the memory of what they return."""

    def __init__(self, kind: str = "cuda") -> None:
        super().__init__()
        self.kind = kind
        self.works: Works = Counter()
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._events: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        question = self.kind, question_of(func, args, kwargs)
        if (known := _KNOWN.get(question)) is None:
            return self._observe(question, func, args, kwargs)
        fresh, work = known
        self.works[work] += 1
        return func(*args, **kwargs) if fresh is None else self._again(fresh)

    def _observe(self, question: tuple[str, Hashable | None], func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call an op of which nothing is known, note what it does, and remember it where the question says all."""
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in made if self._is_fresh(tensor, given)]
        for tensor in fresh:
            self._take(tensor.untyped_storage())
        if func.overloadpacket not in _META_ONLY:
            changed = made if func._schema.is_mutable else fresh
            work = _work_of(func.overloadpacket, given, changed, func.overloadpacket not in _UNTOUCHED, self.kind)
            self.works[work] += 1
            again = None if func._schema.is_mutable else fresh_of(result, given)
            if question[1] is not None and (again is not None or not fresh):
                _KNOWN[question] = again, work
        return result

    def _again(self, fresh: Fresh) -> Any:
        """Return what an op returned before, in memory of its own."""
        made = fresh.make()
        for tensor in made:
            self._take(tensor.untyped_storage())
        return made[0] if fresh.alone else made

    def note(self, work: Work) -> None:
        """Note what a kernel of our own description does."""
        self.works[work] += 1

    def take_works(self) -> Works:
        """Return what was noted since the last call."""
        found, self.works = self.works, Counter()
        return found

    def peak(
        self,
        passing: Iterable[Tensor] = (),
        below: float = math.inf,
        least: float = 0,
        always: Iterable[Tensor] = (),
    ) -> int:
        """Return the bytes at the worst moment so far.

        Args:
            passing: tensors that count from their birth to that of the next of them, and not to their end.
            below: smaller blocks alone.
            least: blocks of at least so many bytes alone.
            always: tensors that count whatever their size is.
        """
        short, counted = ({self._numbers[one.untyped_storage()] for one in tensors} for tensors in (passing, always))
        live = peak = last = 0
        for number, nbytes in self._events:
            if not least <= abs(nbytes) < below and number not in counted:
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


def _work_of(packet: Any, given: list[Tensor], made: list[Tensor], touched: bool, kind: str) -> Work:
    if not made or not touched:
        return Work("call")
    itemsize = made[0].element_size()
    if packet is torch.ops.raymuon.rows_product:
        x, weights = given[:2]
        return work_of_grouped(kind, len(weights), len(x), weights.size(1), weights.size(2), itemsize)
    if packet is torch.ops.raymuon.stacked_product:
        a, b, ends = given
        return work_of_stacked(kind, len(ends), a.size(1), len(a), b.size(1), itemsize)
    if packet in (aten.mm, aten.addmm):
        a, b = given[-2:]
        return product(1, a.shape[0], a.shape[1], b.shape[1], itemsize)
    if packet in (aten.bmm, aten.baddbmm):
        a, b = given[1:3] if packet is aten.baddbmm else given[:2]
        return product(a.shape[0], a.shape[1], a.shape[2], b.shape[2], itemsize)
    moved = float(sum(nbytes_of(tensor) for tensor in (*given, *made)))
    if packet in _SPECIAL:
        return Work("special", moved, moved, moved)
    if packet in _GATHER:
        return Work("gather", moved, moved, moved)
    return Work("elementwise", moved, moved, moved)


class _Costed(torch.autograd.Function):
    """A kernel that is not run: what it tells is noted, and what it keeps is kept."""

    @staticmethod
    def forward(ctx: Any, recorder: OpRecorder, cost: Cost, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*cost.kept)
        ctx.made = [(one.shape, one.dtype) if _learns(one) else None for one in arguments]
        ctx.recorder, ctx.works, ctx.gradients = recorder, cost.backward, cost.gradients
        for work in cost.forward:
            recorder.note(work)
        return cost.result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        for work in ctx.works:
            ctx.recorder.note(work)
        gradients, ctx.gradients = ctx.gradients, ()  # Held by nobody else: autograd takes them and makes no copy.
        rest = ctx.made[len(gradients) :]
        made = [one and torch.empty(one[0], dtype=one[1], device="meta") for one in rest]
        return None, None, *gradients, *made


def _learns(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


@functools.lru_cache(maxsize=256)
def micro_batch_of(
    config: ModelConfig,
    micro_batch: int,
    seq_len: int,
    dtype: torch.dtype,
    kind: str,
    watched: bool = False,
    documents: bool = False,
    recomputed: int = 0,
    chunked: bool = False,
) -> MicroBatch:
    """Run the model without data and return what a micro-batch takes.

    Args:
        config: the model.
        micro_batch: sequences.
        seq_len: tokens of each.
        dtype: of the weights.
        kind: of the device whose kernels are taken, `cpu` or `cuda`.
        watched: attention's largest logits are kept, for which a CPU writes all scores.
        documents: attention stays within documents, of which nothing is known: a GPU is taken to leave out no block
            for them.
        recomputed: layers that are computed again in the backward pass.
        chunked: all logits are never there at once.
    """
    with torch.device("meta"):
        model = build_empty(config).to(dtype)
        watch(model, watched and kind == "cpu")
        recompute(model, recomputed)
        tokens = torch.zeros(micro_batch, seq_len + 1, dtype=torch.int64)
    recorder = OpRecorder(kind)
    kept: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    def told(kernel: Kernel, *arguments: Any) -> Tensor:
        """Take a kernel at its word, where the device has one."""
        cost = kernel.cost(kind, *arguments)
        if cost is None:
            return kernel.run(*arguments)
        if kernel is attention and keeping():
            kept.append((cost.result, cost.kept[4:]))
        elif kernel is attention and recomputing() and kept:  # The last layer is the first to be computed again.
            result, rest = kept.pop()
            out = result.detach()
            cost = replace(cost, result=out, kept=(*arguments[:3], out, *rest), forward=())
        return _Costed.apply(recorder, cost, *arguments)

    with recorder, stand_in(told):
        batch = batch_of(tokens, documents=tokens.int() if documents else None)
        loss = summed_loss(model(*batch.given), model.head, batch.targets, chunked)
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
        blocks=_blocks(recorder),
        blocks_beside_gradients=_blocks(recorder, gradients, there=True),
        blocks_of_bucket=replace(_blocks(recorder, gradients), large=recorder.peak(least=HEAP_BLOCK, always=gradients)),
    )


def _blocks(recorder: OpRecorder, passing: Sequence[Tensor] = (), there: bool = False) -> Blocks:
    """Sort what was taken; `there`: those that pass are all there as well."""
    sizes = [one.nbytes for one in passing] if there else []
    small = recorder.peak(passing, HEAP_BLOCK) + sum(size for size in sizes if size < HEAP_BLOCK)
    room = max(HEAP_BLOCK, small)
    return Blocks(
        small,
        fitting=recorder.peak(passing, room) + sum(size for size in sizes if size < room),
        large=recorder.peak(passing, least=HEAP_BLOCK) + sum(size for size in sizes if size >= HEAP_BLOCK),
    )


@contextmanager
def recorded() -> Iterator[OpRecorder]:
    """Note what is called on tensors without data."""
    recorder = OpRecorder()
    with recorder:
        yield recorder
