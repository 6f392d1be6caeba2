"""Parts of `bench gpu` with four layers of Moonlight-16B's width: memory and speed, each beside the plan's figure.

There is no optimizer: what is planned and what is measured are one micro-batch's forward and backward pass.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from jobs.bench.gpu_rows import NEEDS_GPU, Bench, Row, attempt, passes_of, peak_of
from jobs.planning.cost import seconds
from jobs.planning.devices import calibration_of
from jobs.planning.work import MicroBatch, micro_batch_of
from workers.calibrate import Calibration, measure_device
from workers.gpus import peak_tflops, type_of
from workers.models import LanguageModel, build_empty
from workers.models.compiled import compile_layers
from workers.models.recompute import recompute
from workers.objective import batch_of, summed_loss

LOGITS = ("whole", "chunked")
MEMORY_CHOICES = (("none", "whole"), ("all", "whole"), ("all", "chunked"))


class Cut:
    """The cut model and its one sequence."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        with torch.device(bench.device):
            self.model: LanguageModel = build_empty(bench.model)
        self.model.initialize(bench.model.init_std)
        self.model.to(bench.dtype).train()
        tokens = torch.randint(bench.model.vocab_size, (1, bench.tokens + 1))
        self.batch = batch_of(tokens).to(bench.device)
        self.leaves = list(self.model.parameters())

    def way(self, recomputed: str, logits: str, compiled: bool = False) -> Callable[[], Tensor]:
        """Return the forward pass with these choices, until the next call."""
        for block in self.model.blocks:
            block.__dict__.pop("forward", None)
        if compiled:
            compile_layers(self.model)
        recompute(self.model, self.layers(recomputed))
        head, targets = self.model.head, self.batch.targets
        return lambda: summed_loss(self.model(*self.batch.given), head, targets, logits == "chunked")

    def layers(self, recomputed: str) -> int:
        """Return how many layers are computed again."""
        return len(self.model.blocks) if recomputed == "all" else 0

    def planned(self, recomputed: str, logits: str) -> MicroBatch:
        """Return the plan of these choices."""
        bench = self.bench
        return micro_batch_of(
            *(bench.model, 1, bench.tokens, bench.dtype, bench.device.type),
            recomputed=self.layers(recomputed),
            chunked=logits == "chunked",
        )


def memory(bench: Bench) -> Iterator[Row]:
    """Measure the worst moment of the passes against the plan's."""
    cut = Cut(bench)

    def measure(recomputed: str, logits: str) -> Iterator[Row]:
        planned = cut.planned(recomputed, logits).peak / 1e9
        found = peak_of(bench, cut.way(recomputed, logits), cut.leaves)
        after, problem = (None, NEEDS_GPU) if found is None else (found / 1e9, "")
        yield Row(_name(recomputed, logits), "GB", planned, after, note="plan and reality", problem=problem)

    for choice in MEMORY_CHOICES:
        yield from attempt(_name(*choice), partial(measure, *choice))


def _name(recomputed: str, logits: str, compiled: bool = False) -> str:
    return f"4 layers, recompute {recomputed}, logits {logits}{', compiled' if compiled else ''}"


def speed(bench: Bench, keep: Callable[[str], None]) -> Iterator[Row]:
    """Calibrate, and measure the passes against the plan by that calibration.

    Args:
        bench: where and how large.
        keep: takes the calibration as its file has it.
    """
    found: list[Calibration] = []

    def calibrate() -> Iterator[Row]:
        found.append(measure_device(bench.device))
        keep(found[0].to_json())
        yield from calibrated(found[0])

    yield from attempt("calibration", calibrate)
    cut = Cut(bench)
    peak = peak_tflops(bench.device) * 1e12
    per_token = cut.model.flops_per_token(bench.tokens)

    def rates(name: str, taken: float) -> Iterator[Row]:
        per_second = bench.tokens / taken
        yield Row(f"{name}: speed", "tokens/s", value=per_second, note=f"MFU {per_token * per_second / peak:.1%}")

    eager: dict[tuple[str, str], float] = {}

    def measure(recomputed: str, logits: str) -> Iterator[Row]:
        name = _name(recomputed, logits)
        planned = None
        if found:
            micro = cut.planned(recomputed, logits)
            planned = 1e3 * (seconds(micro.forward, found[0]) + seconds(micro.backward, found[0]))
        taken = sum(passes_of(bench, {"": cut.way(recomputed, logits)}, cut.leaves)[""])
        eager[recomputed, logits] = taken
        yield Row(f"{name}: forward and backward", "ms", planned, 1e3 * taken, note="plan and reality")
        yield from rates(name, taken)

    def compiled(recomputed: str, logits: str) -> Iterator[Row]:
        name = _name(recomputed, logits, compiled=True)
        taken = sum(passes_of(bench, {"": cut.way(recomputed, logits, compiled=True)}, cut.leaves)[""])
        before, note = eager.get((recomputed, logits)), "op by op and compiled"
        note = note if bench.on_gpu else "the compiler is not called in the tiny form"
        yield Row(f"{name}: forward and backward", "ms", before and 1e3 * before, 1e3 * taken, note=note)
        yield from rates(name, taken)

    choices = [(recomputed, logits) for recomputed in ("none", "all") for logits in LOGITS]
    for choice in choices:
        yield from attempt(_name(*choice), partial(measure, *choice))
    for choice in choices:  # Behind all others: nobody knows how long it takes.
        yield from attempt(_name(*choice, compiled=True), partial(compiled, *choice))


def calibrated(found: Calibration) -> Iterator[Row]:
    """Yield the calibration's largest figures, beside what a plan from the data sheet assumes of them."""
    known = calibration_of(type_of(found.device), 1, 1) if type_of(found.device) else None
    for kind, curve in found.curves.items():
        scale, unit = (1e12, "TFLOP/s") if kind in ("matmul", "attention", "attention_backward") else (1e9, "GB/s")
        assumed = None if known is None else known.curves[kind].rate(curve.sizes[-1]) / scale
        yield _rate_row(f"calibration: {kind}", unit, assumed, curve.rates[-1] / scale)
    assumed = None if known is None else 1e6 * known.seconds_per_op
    yield _rate_row("calibration: an op's call", "us", assumed, 1e6 * found.seconds_per_op)
    assumed = None if known is None else known.host_bytes_per_s / 1e9
    yield _rate_row("calibration: to the host", "GB/s", assumed, found.host_bytes_per_s / 1e9)


def _rate_row(what: str, unit: str, assumed: float | None, measured: float) -> Row:
    if assumed is None:
        return Row(what, unit, value=measured)
    return Row(what, unit, assumed, measured, note="assumed and measured")
