"""What the parts of `bench gpu` have in common: a row of the table, sizes, and how anything is timed.

Invariant: what goes wrong is a row as well. A measurement that fails says why in its own row, and the next one begins
with the memory that it held given back.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optim.exchange import dtype_on
from workers.config import MoonlightConfig

NEEDS_GPU = "needs a GPU"
LAYERS = 4
"""Of the cut model."""
WARMUP = 2
"""Rounds that are not counted."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Of the difference that rounding makes, relative to the norm."""
LONGEST_PROBLEM = 400


@dataclass(frozen=True)
class Row:
    """A line of the table: `before` and `after` of a comparison, or a `value`, or a problem."""

    what: str
    unit: str = ""
    before: float | None = None
    after: float | None = None
    value: float | None = None
    note: str = ""
    problem: str = ""

    @property
    def ratio(self) -> float | None:
        """Return before over after: how many times less time or memory; of a plan, plan over reality."""
        return self.before / self.after if self.before is not None and self.after else None

    @property
    def measured(self) -> bool:
        """Tell whether there is a figure."""
        return self.after is not None or self.value is not None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how large."""

    device: torch.device
    dtype: torch.dtype
    model: MoonlightConfig
    """Moonlight-16B's widths, with fewer layers."""
    tokens: int
    """Of the one sequence."""
    matrices: tuple[int, int, int]
    """That Newton-Schulz takes at once."""
    copied: int
    """Bytes of the snapshot."""
    side: int
    """Of the products beside which it is copied."""
    rounds: int

    @staticmethod
    def of(model: MoonlightConfig, tiny: bool) -> "Bench":
        """Return the true sizes for a GPU, or sizes that show on a CPU that everything runs.

        Args:
            model: Moonlight-16B.
            tiny: on a CPU.
        """
        cut, device = replace(model, num_layers=LAYERS), torch.device("cpu" if tiny else "cuda")
        dtype = dtype_on(device.type)
        if not tiny:
            sizes = {"tokens": 8192, "matrices": (16, 1408, 2048), "copied": 10**9, "side": 8192, "rounds": 7}
            return Bench(device=device, dtype=dtype, model=cut, **sizes)
        small = replace(
            cut,
            vocab_size=1024,
            hidden_size=128,
            num_heads=4,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            intermediate_size=704,
            moe_intermediate_size=88,
            num_experts=8,
            num_experts_per_token=2,
        )
        sizes = {"tokens": 256, "matrices": (2, 88, 128), "copied": 10**6, "side": 64, "rounds": 2}
        return Bench(device=device, dtype=dtype, model=small, **sizes)

    @property
    def on_gpu(self) -> bool:
        """Tell whether memory and streams can be measured."""
        return self.device.type == "cuda"

    def random(self, *shape: int, scale: float = 1.0, learns: bool = True) -> Tensor:
        """Return normal numbers in the dtype of the weights."""
        made = torch.randn(shape, device=self.device, dtype=self.dtype) * scale
        return made.requires_grad_() if learns else made


def attempt(what: str, measure: Callable[[], Iterable[Row]]) -> list[Row]:
    """Return the rows of a measurement, or one that says why there are none."""
    rows: list[Row] = []
    try:
        rows.extend(measure())
    except Exception as error:  # Whatever it is, the others go on.
        rows.append(Row(what, problem=one_line(error)))
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return rows


def one_line(error: Exception | str) -> str:
    """Return an error as one line that is not too long."""
    text = " ".join(str(error).split()) or "no message"
    name = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return (name + text)[:LONGEST_PROBLEM]


def wait(bench: Bench) -> None:
    """Wait for the device."""
    if bench.on_gpu:
        torch.cuda.synchronize(bench.device)


def seconds_of(bench: Bench, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each call, in rounds of one of each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(WARMUP + bench.rounds):
        for name, call in calls.items():
            wait(bench)
            begin = time.perf_counter()
            call()
            wait(bench)
            if round_ >= WARMUP:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in taken.items()}


def passes_of(
    bench: Bench, forwards: Mapping[str, Callable[[], Tensor]], leaves: Sequence[Tensor]
) -> dict[str, tuple[float, float]]:
    """Return the median seconds of the forward and of the backward pass of each, in rounds of one of each.

    Args:
        bench: where.
        forwards: by name.
        leaves: whose gradients are not added up.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in forwards}
    for round_ in range(WARMUP + bench.rounds):
        for name, forward in forwards.items():
            forget(leaves)
            wait(bench)
            begin = time.perf_counter()
            out = forward()
            wait(bench)
            between = time.perf_counter()
            gradient = torch.ones_like(out)
            wait(bench)
            again = time.perf_counter()
            out.backward(gradient)
            wait(bench)
            end = time.perf_counter()
            del out
            if round_ >= WARMUP:
                taken[name].append((between - begin, end - again))
    forget(leaves)
    return {
        name: (statistics.median(one for one, _ in times), statistics.median(one for _, one in times))
        for name, times in taken.items()
    }


def forget(leaves: Iterable[Tensor]) -> None:
    """Drop the gradients."""
    for leaf in leaves:
        leaf.grad = None


def peak_of(bench: Bench, forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> int | None:
    """Return the bytes that a forward and backward pass takes at its worst moment; None on a CPU.

    The pass runs once before, for what libraries take and keep.
    """
    for counted in (False, True):
        forget(leaves)
        wait(bench)
        before = 0
        if bench.on_gpu and counted:
            torch.cuda.reset_peak_memory_stats(bench.device)
            before = torch.cuda.memory_allocated(bench.device)
        out = forward()
        out.backward(torch.ones_like(out))
        del out
        if bench.on_gpu and counted:
            wait(bench)
            found = torch.cuda.max_memory_allocated(bench.device) - before
            forget(leaves)
            return found
    forget(leaves)
    return None


def kept_of(bench: Bench, forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, its result not among them.

    Args:
        bench: where; on a CPU what autograd saves is counted, on a GPU what is allocated.
        forward: the pass.
        held: what is there anyhow.
    """
    if bench.on_gpu:
        wait(bench)
        before = torch.cuda.memory_allocated(bench.device)
        out = forward()
        return torch.cuda.memory_allocated(bench.device) - before - out.nbytes
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    saved.pop(out.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest of the tensors' differences, each relative to the norm of what is expected."""
    shares = [
        ((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-30)).item()
        for one, other in zip(found, expected, strict=True)
    ]
    return max(shares)


def agreement(what: str, bench: Bench, found: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
    """Return the row that says how far two ways are apart."""
    apart = difference(found, expected)
    allowed = TOLERANCE[bench.dtype]
    problem = "" if apart <= allowed else f"more than rounding makes, {allowed:g}"
    return Row(what, "relative", value=apart, problem=problem)
