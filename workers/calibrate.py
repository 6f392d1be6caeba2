"""What one device and one process group really do: the figures with which `raymuon plan` computes a step's time.

A device is described by rates over sizes, as no single number is right: a small product or a short vector runs at a
fraction of the peak. Each curve is measured on the ops that training runs, with fresh results as autograd makes them,
so that what the allocator costs is part of it.

On a CPU with other work, a short op is mostly left in peace and a step of a second never: so ops are timed in the
thread's own processor time, and the share of it in the time in which the thread wanted a processor is told beside them.
"""

import itertools
import json
import math
import platform
import statistics
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from optim.config import precision_on
from optim.exchange import dtype_on
from workers.common.errors import ConfigError
from workers.models.kernels import causal_keys
from workers.work import KINDS, harmonic

FORMAT = 1
MIB = 1 << 20
SECONDS_PER_POINT = 0.03
POOL_BYTES = 192 * MIB
"""Over which elements are streamed, at least."""
_ATTENTION_HEADS, _ROW = 4, 256
_Point = tuple[Callable[[], Any], float, float]
"""What is called, its work, and its place on the axis of sizes."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A rate over sizes; between the points it is interpolated, outside of them it is that of the nearest one."""

    sizes: tuple[float, ...]
    """In rising order. Of products the harmonic mean of their three sides, of the rest the bytes read and written."""
    rates: tuple[float, ...]
    """Operations or bytes per second."""

    def rate(self, size: float) -> float:
        """Return the rate at a size, straight between points on logarithmic axes."""
        sizes, rates = self.sizes, self.rates
        if size <= sizes[0]:
            return rates[0]
        if size >= sizes[-1]:
            return rates[-1]
        after = bisect_right(sizes, size)
        low, high = sizes[after - 1], sizes[after]
        share = math.log(size / low) / math.log(high / low)
        return rates[after - 1] * (rates[after] / rates[after - 1]) ** share


@dataclass(frozen=True, slots=True)
class Collective:
    """What a collective costs at a world size: `latency_s + bytes that a rank sends / bytes_per_s`.

    The bytes are those of the ring algorithms (`workers/traffic.py`).
    """

    name: str
    world_size: int
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One worker's device as it was measured, and the collectives of the group that it was in."""

    device: str
    """Name, for people."""
    kind: str
    """`cpu` or `cuda`."""
    precision: str
    """Of the products: `fp32` or `bf16`."""
    memory_bytes: int
    """Of a GPU; of a CPU, the machine's."""
    seconds_per_op: float
    """Cost of calling an op in a training step, however small it is, its share of autograd included."""
    curves: dict[str, Curve] = field(hash=False)
    """By `KINDS`."""
    host_bytes_per_s: float
    """At which a shard is copied into the keeper's memory."""
    share: float = 1.0
    """Of the time in which the process wanted a processor and had one, while it was measured; 1 on a machine of its
    own."""
    collectives: tuple[Collective, ...] = ()
    """By name and world size, in wall time."""

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str, where: str = "calibration") -> "Calibration":
        """Read the file's text.

        Args:
            text: as `to_json` wrote it.
            where: the file, for the message.

        Raises:
            ConfigError: it is not one, or of a format that is not known here.
        """
        try:
            found = json.loads(text)
            version = found.pop("format")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"{where}: not a calibration; make one with raymuon doctor --calibration FILE") from error
        if version != FORMAT:
            raise ConfigError(f"{where}: format {version}; this raymuon reads {FORMAT}; measure anew")
        try:
            curves = {
                kind: Curve(tuple(curve["sizes"]), tuple(curve["rates"])) for kind, curve in found.pop("curves").items()
            }
            collectives = tuple(Collective(**one) for one in found.pop("collectives"))
            made = Calibration(curves=curves, collectives=collectives, **found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{where}: damaged calibration ({error}); measure anew") from error
        if missing := [kind for kind in KINDS if kind not in curves or not curves[kind].sizes]:
            raise ConfigError(f"{where}: damaged calibration, it lacks {', '.join(missing)}; measure anew")
        return made

    def with_collectives(self, collectives: Sequence[Collective]) -> "Calibration":
        """Return it with collectives added; those of the same name and world size are replaced."""
        new = {(one.name, one.world_size): one for one in (*self.collectives, *collectives)}
        return replace(self, collectives=tuple(new.values()))

    def with_speed_of(self, others: Sequence["Calibration"]) -> "Calibration":
        """Return the median of several measurements of like devices, point by point."""
        every = (self, *others)

        def median(pick: Callable[["Calibration"], float]) -> float:
            return statistics.median(pick(one) for one in every)

        curves = {
            kind: Curve(
                curve.sizes,
                tuple(median(lambda one: one.curves[kind].rates[i]) for i in range(len(curve.sizes))),  # noqa: B023
            )
            for kind, curve in self.curves.items()
        }
        by_place: dict[tuple[str, int], list[Collective]] = {}
        for one in every:
            for collective in one.collectives:
                by_place.setdefault((collective.name, collective.world_size), []).append(collective)
        return replace(
            self,
            seconds_per_op=median(lambda one: one.seconds_per_op),
            share=median(lambda one: one.share),
            host_bytes_per_s=median(lambda one: one.host_bytes_per_s),
            curves=curves,
            collectives=tuple(
                Collective(
                    name,
                    world_size,
                    statistics.median(one.latency_s for one in same),
                    statistics.median(one.bytes_per_s for one in same),
                )
                for (name, world_size), same in by_place.items()
            ),
        )


def processor_seconds() -> tuple[float, float]:
    """Return the seconds in which this thread has had a processor and has waited for one, as Linux counts them."""
    try:
        own, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except OSError:
        return time.thread_time(), 0.0
    return int(own) / 1e9, int(waited) / 1e9


def processor_share(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return the share of the time between two calls in which the thread wanted a processor and had one."""
    own, waited = after[0] - before[0], after[1] - before[1]
    return own / (own + waited) if own > 0 else 1.0


def measure_device(device: torch.device) -> Calibration:
    """Measure this process's device with its present number of threads; about five seconds on a CPU.

    Workers that share a machine should measure at the same time: they share its memory while they train.
    """
    cuda = device.type == "cuda"
    if cuda:
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        name = f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
        memory = psutil.virtual_memory().total
    began = processor_seconds()
    found = Calibration(
        device=name,
        kind=device.type,
        precision=precision_on(device.type),
        memory_bytes=memory,
        seconds_per_op=_seconds_per_op(device),
        curves=_curves(device, dtype_on(device.type)),
        host_bytes_per_s=_host_bytes_per_s(device),
    )
    return found if cuda else replace(found, share=processor_share(began, processor_seconds()))


def measure_collectives(group: dist.ProcessGroup | None, device: torch.device) -> tuple[Collective, ...]:
    """Measure the process group's collectives; all its ranks call this together and get the same figures.

    Args:
        group: None for the default one.
        device: that the group's backend works on.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return ()
    large = 64 * MIB if device.type == "cuda" else 8 * MIB
    calls: dict[str, Callable[[Tensor], Any]] = {
        "all_reduce": lambda flat: dist.all_reduce(flat, group=group),
        "reduce": lambda flat: dist.reduce(flat, group=group, group_dst=0),
        "all_gather": lambda flat: dist.all_gather_into_tensor(flat, flat.chunk(size)[0].clone(), group=group),
        "all_to_all": lambda flat: dist.all_to_all_single(torch.empty_like(flat), flat, group=group),
    }
    rounds = {"all_reduce": 2}
    found = []
    for name, call in calls.items():
        seconds = []
        for total in (256 * size, large):
            flat = torch.zeros(total // 4 // size * size, device=device)
            spent = torch.tensor(_wall_times(lambda: call(flat), device))  # noqa: B023
            spent = spent.to(device)
            dist.all_reduce(spent, dist.ReduceOp.MAX, group=group)
            seconds.append(spent.median().item())
        sent = rounds.get(name, 1) * large * (size - 1) / size
        found.append(Collective(name, size, seconds[0], sent / max(seconds[1] - seconds[0], 1e-9)))
    return tuple(found)


def _times(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Return the seconds of each of several calls: five, or as many more as the time for a point allows."""
    spent: list[float] = []
    now = _clock(device)
    for _ in range(2):
        call()
    while len(spent) < 5 or (sum(spent) < SECONDS_PER_POINT and len(spent) < 300):
        _wait(device)
        clock = now()
        call()
        _wait(device)
        spent.append(now() - clock)
    return spent


def _wall_times(call: Callable[[], Any], device: torch.device, rounds: int = 15) -> list[float]:
    """Return the seconds of each of so many calls that wait for other ranks: as many calls on every rank."""
    spent = []
    for _ in range(rounds + 2):
        _wait(device)
        clock = time.perf_counter()
        call()
        _wait(device)
        spent.append(time.perf_counter() - clock)
    return spent[2:]


def _clock(device: torch.device) -> Callable[[], float]:
    """Return the clock of work: that of the thread on one core, the wall's where others work for it."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds_per_op(device: torch.device) -> float:
    """Return what a tiny product of elements costs, forward and backward, by op: three ops for each."""
    x = torch.ones(16, device=device, requires_grad=True)
    chain = 50

    def call() -> None:
        y = x
        for _ in range(chain):
            y = y * x
        y.sum().backward()
        x.grad = None

    # In the backward pass each product is two products and an addition of gradients.
    return statistics.median(_times(call, device)) / (4 * chain)


def _curves(device: torch.device, dtype: torch.dtype) -> dict[str, Curve]:
    cuda = device.type == "cuda"

    def curve(sizes: Sequence[Any], prepare: Callable[[Any], _Point]) -> Curve:
        points = []
        for size in sizes:
            call, work, place = prepare(size)
            points.append((place, work / statistics.median(_times(call, device))))
        return Curve(tuple(place for place, _ in points), tuple(rate for _, rate in points))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    sizes = [1 << power for power in ((14, 16, 20, 24, 26, 28) if cuda else (14, 16, 18, 20, 22, 24, 26, 28))]
    sides = (64, 128, 256, 512, 1024, 2048, 4096, 8192) if cuda else (16, 32, 64, 128, 256, 512, 1024)
    small, large = ((256, 16), (256, 32), (256, 64), (1024, 64)), ((512, 64), (2048, 64), (4096, 128), (8192, 128))
    heads_of = large if cuda else small
    pool = random(max(POOL_BYTES // dtype.itemsize, 2 * sides[-1] ** 2))  # The largest product finds its two operands.

    def matmul(side: int) -> _Point:
        batch = max(1, 2 * (64 // side) ** 2)  # So many that calling it counts for little.
        elements, work = batch * side**2, 2.0 * batch * side**3

        def call(a: Tensor, b: Tensor) -> Tensor:
            return torch.bmm(a.view(batch, side, side), b.view(batch, side, side))

        return streamed(call, 2, elements, 3 * elements * dtype.itemsize, work, side)

    def heads(time_: int, width: int) -> tuple[list[Tensor], float, float]:
        """Return queries, keys and values, the operations of the forward pass, and the place on the axis."""
        batch = max(1, 2048 // time_)
        qkv = [random(batch, _ATTENTION_HEADS, time_, width).requires_grad_() for _ in range(3)]
        work = 4.0 * batch * _ATTENTION_HEADS * time_ * causal_keys(time_, device.type) * width
        return qkv, work, harmonic(time_, time_, width)

    def attention(shape: tuple[int, int]) -> _Point:
        (q, k, v), work, place = heads(*shape)
        return (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)), work, place

    def attention_backward(shape: tuple[int, int]) -> _Point:
        (q, k, v), work, place = heads(*shape)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gradient = torch.ones_like(out)
        return (lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)), 2.5 * work, place

    def streamed(
        call: Callable[..., Tensor], arrays: int, elements: int, nbytes: float, work: float = 0.0, place: float = 0.0
    ) -> _Point:
        """Call it on other elements each time, as training does: what was read last lies in no near cache."""
        chunks = itertools.cycle(pool.split(elements)[: len(pool) // elements // arrays * arrays])
        results: deque[Tensor] = deque(maxlen=max(1, int(POOL_BYTES // 4 / nbytes)))
        run = lambda: results.append(call(*itertools.islice(chunks, arrays)))  # noqa: E731
        for _ in range(results.maxlen or 0):  # The allocator's memory is found once, not in every step.
            run()
        return run, work or nbytes, place or nbytes

    def elementwise(nbytes: int) -> _Point:
        return streamed(torch.mul, 2, nbytes // dtype.itemsize // 3, nbytes)

    def special(nbytes: int) -> _Point:
        return streamed(F.silu, 1, nbytes // dtype.itemsize // 2, nbytes)

    def gather(nbytes: int) -> _Point:
        rows = max(1, nbytes // (2 * _ROW * dtype.itemsize))
        places = torch.randperm(rows, device=device)
        return streamed(lambda flat: flat.view(-1, _ROW)[places], 1, rows * _ROW, nbytes)

    return {
        "matmul": curve(sides, matmul),
        "attention": curve(heads_of, attention),
        "attention_backward": curve(heads_of, attention_backward),
        "elementwise": curve(sizes, elementwise),
        "special": curve(sizes[:-2], special),
        "gather": curve(sizes[:-2], gather),
    }


def _host_bytes_per_s(device: torch.device) -> float:
    """Return the speed of copying from the device into host memory that is used again and again."""
    source = torch.ones(16 * MIB, device=device)
    target = torch.empty_like(source, device="cpu")
    return source.nbytes / statistics.median(_times(lambda: target.copy_(source), device))
