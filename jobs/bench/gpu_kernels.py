"""Parts of `bench gpu` that measure one thing alone: attention, a layer of experts, the loss, a copy, Newton-Schulz."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.bench.gpu_rows import (
    NEEDS_GPU,
    Bench,
    Row,
    agreement,
    attempt,
    difference,
    kept_of,
    one_line,
    passes_of,
    peak_of,
    seconds_of,
)
from optim.newton_schulz import Workspace, newton_schulz
from optim.polynomials import coefficients
from workers.models.experts import MixtureOfExperts
from workers.models.masks import causal_blocks, compiled_flex
from workers.objective import summed_loss

BACK_ENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SHORTER = 4
"""By which the sequence of attention that writes all scores is divided."""
PRODUCTS = 20
"""Beside a copy."""


def attention(bench: Bench) -> Iterator[Row]:
    """Measure each of torch's ways to attend, against the one that it takes by itself."""
    config = bench.model
    widths = (config.qk_nope_head_dim + config.qk_rope_head_dim,) * 2 + (config.v_head_dim,)

    def made(tokens: int) -> list[Tensor]:
        return [bench.random(1, config.num_heads, tokens, width) for width in widths]

    qkv = made(bench.tokens)
    yield from attempt("torch's own choice", lambda: _chosen(bench, qkv))
    ways: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        name: (partial(_by, one), qkv) for name, one in BACK_ENDS.items() if name != "math"
    }
    ways["flash, values padded"] = _padded, qkv
    ways["FlexAttention"] = _flex, qkv
    ways[f"math, {bench.tokens // SHORTER:,} tokens"] = partial(_by, SDPBackend.MATH), made(bench.tokens // SHORTER)
    for name, (way, given) in ways.items():
        if not bench.on_gpu and not name.startswith("math"):
            yield Row(name, problem=NEEDS_GPU)
            continue
        yield from attempt(name, partial(_against, name, bench, way, given))


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _by(back_end: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(back_end):
        return _plain(q, k, v)


def _padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _by(SDPBackend.FLASH_ATTENTION, q, k, F.pad(v, (0, q.size(-1) - v.size(-1))))[..., : v.size(-1)]


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return compiled_flex()(q, k, v, block_mask=causal_blocks(q.size(2), q.device))


def _rate(qkv: list[Tensor], seconds: float, products: float) -> str:
    """Return a note about the speed; half of the square of scores counts."""
    (batch, heads, time, width), value_width = qkv[0].shape, qkv[2].size(-1)
    return f"{products * batch * heads * time * time * (width + value_width) / seconds / 1e12:,.3g} TFLOP/s"


def _chosen(bench: Bench, qkv: list[Tensor]) -> Iterator[Row]:
    q, k, v = qkv
    forward, backward = passes_of(bench, {"": lambda: _plain(q, k, v)}, qkv)[""]
    number = torch._fused_sdp_choice(q, k, v, None, 0.0, True)
    taken = next((one.name for one in SDPBackend.__members__.values() if one.value == number), str(number))
    note = f"{taken}, {_rate(qkv, forward, 1)}"
    yield Row("torch's own choice: forward", "ms", value=1e3 * forward, note=note)
    yield Row("torch's own choice: backward", "ms", value=1e3 * backward, note=_rate(qkv, backward, 2.5))


def _against(name: str, bench: Bench, way: Callable[..., Tensor], qkv: list[Tensor]) -> Iterator[Row]:
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        try:
            apart = difference([way(*qkv)], [_plain(*qkv)])
        except RuntimeError as error:
            told = " ".join(str(one.message).split(" (Triggered")[0] for one in reasons)
            yield Row(name, problem=one_line(f"refused: {told or error}"))
            return
    if apart > 2e-2:
        yield Row(name, problem=f"another result: {apart:.2g} relative to it")
        return
    taken = passes_of(bench, {"before": lambda: _plain(*qkv), "after": lambda: way(*qkv)}, qkv)
    for place, (step, products) in enumerate((("forward", 1.0), ("backward", 2.5))):
        before, after = taken["before"][place], taken["after"][place]
        yield Row(f"{name}: {step}", "ms", 1e3 * before, 1e3 * after, note=_rate(qkv, after, products))


def mixture(bench: Bench) -> Iterator[Row]:
    """Measure one layer of experts against the plain operations that it replaces."""
    config = bench.model
    with torch.device(bench.device):
        layer = MixtureOfExperts(config).to(bench.dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=config.init_std)
    x = bench.random(1, bench.tokens, config.hidden_size)
    leaves = [x, *layer.parameters()]
    ways: dict[str, Callable[[], Tensor]] = {"before": lambda: plain_mixture(layer, x), "after": lambda: layer(x)}

    def times() -> Iterator[Row]:
        taken = passes_of(bench, ways, leaves)
        for place, step in enumerate(("forward", "backward")):
            before, after = (1e3 * taken[name][place] for name in ways)
            yield Row(f"layer of experts: {step}", "ms", before, after)

    def equal() -> Iterator[Row]:
        found = {}
        for name, way in ways.items():
            out = way()
            weight = torch.linspace(-1, 1, out.size(-1), device=bench.device, dtype=bench.dtype)
            found[name] = (out.detach(), *torch.autograd.grad(out, leaves, weight.expand_as(out)))
        yield agreement("layer of experts: outputs' difference", bench, found["after"][:1], found["before"][:1])
        yield agreement("layer of experts: gradients' difference", bench, found["after"][1:], found["before"][1:])

    def kept() -> Iterator[Row]:
        before, after = (kept_of(bench, way, leaves) / 1e6 for way in ways.values())
        yield Row("layer of experts: kept for the backward pass", "MB", before, after)

    def peaks() -> Iterator[Row]:
        found = [peak_of(bench, way, leaves) for way in ways.values()]
        yield _memory_row("layer of experts: peak, gradients among it", *found)

    yield from attempt("layer of experts: difference", equal)
    yield from attempt("layer of experts: times", times)
    yield from attempt("layer of experts: kept", kept)
    yield from attempt("layer of experts: peak", peaks)


def plain_mixture(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """Return what a layer of experts does, by torch's own operations and their own gradients: the oracle.

    Rows are repeated and sorted, and sorted back by a second sort; the gates are applied to the wide rows.
    """
    rows, experts = x.flatten(0, -2), layer.experts
    gates, chosen = layer.gate(rows)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.zeros_like(layer.load).scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
    ends = counts.cumsum(0).to(torch.int32)
    repeated = rows.repeat_interleave(layer.gate.top_k, dim=0)[order]
    gate = F.grouped_mm(repeated, experts.gate_proj.mT, offs=ends)
    up = F.grouped_mm(repeated, experts.up_proj.mT, offs=ends)
    out = F.grouped_mm(F.silu(gate) * up, experts.down_proj.mT, offs=ends)[order.argsort()]
    mixed = (out.unflatten(0, chosen.shape) * gates.unsqueeze(-1).to(out.dtype)).sum(1).view_as(x)
    if (shared := layer.shared_experts) is None:
        return mixed
    return mixed + shared.down_proj(F.silu(shared.gate_proj(x)) * shared.up_proj(x))


def loss(bench: Bench) -> Iterator[Row]:
    """Measure the loss with all logits at once, and in chunks."""
    config = bench.model
    hidden = bench.random(1, bench.tokens, config.hidden_size)
    head = bench.random(config.vocab_size, config.hidden_size, scale=config.init_std)
    targets = torch.randint(config.vocab_size, (1, bench.tokens), device=bench.device)
    leaves = [hidden, head]
    ways: dict[str, Callable[[], Tensor]] = {
        "before": lambda: summed_loss(hidden, head, targets),
        "after": lambda: summed_loss(hidden, head, targets, chunked=True),
    }
    name = "loss, whole and chunked"

    def equal() -> Iterator[Row]:
        found = {}
        for key, way in ways.items():
            out = way()
            found[key] = (out.detach(), *torch.autograd.grad(out, leaves))
        yield agreement(f"{name}: difference", bench, found["after"], found["before"])

    def times() -> Iterator[Row]:
        taken = passes_of(bench, ways, leaves)
        before, after = (1e3 * sum(taken[key]) for key in ways)
        yield Row(f"{name}: forward and backward", "ms", before, after)

    def peaks() -> Iterator[Row]:
        yield _memory_row(f"{name}: peak, gradients among it", *(peak_of(bench, way, leaves) for way in ways.values()))

    yield from attempt(f"{name}: difference", equal)
    yield from attempt(f"{name}: times", times)
    yield from attempt(f"{name}: peak", peaks)


def _memory_row(what: str, before: int | None, after: int | None) -> Row:
    if before is None or after is None:
        return Row(what, "MB", problem=NEEDS_GPU)
    return Row(what, "MB", before / 1e6, after / 1e6)


def copy(bench: Bench) -> Iterator[Row]:
    """Measure a snapshot's way into host memory, and what computes beside it."""
    source = torch.ones(bench.copied // 4, device=bench.device)
    pageable = torch.empty_like(source, device="cpu")

    def alone() -> Iterator[Row]:
        seconds = seconds_of(bench, {"": lambda: pageable.copy_(source)})[""]
        yield Row("copy to the host, pageable", "ms", value=1e3 * seconds, note=_speed(source, seconds))

    yield from attempt("copy to the host, pageable", alone)
    if not bench.on_gpu:
        for name in ("pinned", "pinned, stream of its own", "products beside it"):
            yield Row(f"copy to the host, {name}", problem=NEEDS_GPU)
        return
    yield from attempt("copy to the host, pinned", lambda: _pinned(bench, source, pageable))


def _pinned(bench: Bench, source: Tensor, pageable: Tensor) -> Iterator[Row]:
    pinned, own = torch.empty_like(pageable, pin_memory=True), torch.cuda.Stream(bench.device)
    a = bench.random(bench.side, bench.side, learns=False)
    result = torch.empty_like(a)

    def here(target: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def aside(target: Tensor) -> None:
        own.wait_stream(torch.cuda.current_stream(bench.device))
        with torch.cuda.stream(own):
            here(target)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, a, out=result)

    def beside(way: Callable[[Tensor], None], target: Tensor) -> Callable[[], None]:
        def both() -> None:
            way(target)
            products()

        return both

    kinds = {"pageable": pageable, "pinned": pinned}
    taken = seconds_of(
        bench,
        {
            "products": products,
            **{name: partial(here, target) for name, target in kinds.items()},
            **{f"{name}, stream of its own": partial(aside, target) for name, target in kinds.items()},
            **{f"{name}, products behind it": beside(here, target) for name, target in kinds.items()},
            **{
                f"{name}, stream of its own, products beside it": beside(aside, target)
                for name, target in kinds.items()
            },
        },
    )
    for name, seconds in taken.items():
        if name in ("products", "pageable"):
            continue
        before = taken["products"] + taken["pinned"] if "products" in name else taken["pageable"]
        note = f"before: a pinned copy and {PRODUCTS} products one after the other" if "products" in name else ""
        note = note or f"before: pageable; {_speed(source, seconds)}"
        yield Row(f"copy to the host, {name}", "ms", 1e3 * before, 1e3 * seconds, note=note)


def _speed(source: Tensor, seconds: float) -> str:
    return f"{source.nbytes / seconds / 1e9:,.3g} GB/s"


def orthogonalization(bench: Bench) -> Iterator[Row]:
    """Measure Newton-Schulz of a batch of experts' matrices, and what compiling it could save."""
    momentum = torch.randn(bench.matrices, device=bench.device)  # fp32, as the optimizer has it.
    polynomials, dtype = coefficients("quintic", 5), torch.bfloat16 if bench.on_gpu else torch.float32
    workspace = Workspace()

    def own() -> Tensor:
        return newton_schulz(momentum, polynomials, dtype=dtype, workspace=workspace)

    def plain(x: Tensor) -> Tensor:
        x = scaled(x, dtype)
        for a, b, c in polynomials:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x

    compiled = torch.compile(plain, dynamic=False)
    compiled_scaled = torch.compile(partial(scaled, dtype=dtype), dynamic=False)
    name = f"Newton-Schulz of {list(bench.matrices)}"

    def whole() -> Iterator[Row]:
        seconds = seconds_of(bench, {"": own})[""]
        _, rows, columns = bench.matrices
        elements = rows * columns * bench.matrices[0]
        operations = (
            len(polynomials) * 2.0 * elements * min(rows, columns) * (2 + min(rows, columns) / max(rows, columns))
        )
        kernel = "with" if find_spec("quack") else "without"
        note = f"{operations / seconds / 1e12:,.3g} TFLOP/s, were all products whole; {kernel} the extra gpu"
        yield Row(f"{name}: as it is", "ms", value=1e3 * seconds, note=note)

    def in_one() -> Iterator[Row]:
        taken = seconds_of(
            bench, {"own": own, "plain": lambda: plain(momentum), "compiled": lambda: compiled(momentum)}
        )
        yield Row(f"{name}: the plain form, not compiled", "ms", 1e3 * taken["own"], 1e3 * taken["plain"])
        yield Row(f"{name}: the plain form, compiled", "ms", 1e3 * taken["own"], 1e3 * taken["compiled"])
        yield agreement(f"{name}: the compiled form's difference", bench, [compiled(momentum)], [plain(momentum)])

    def passes() -> Iterator[Row]:
        ways = {"before": lambda: scaled(momentum, dtype), "after": lambda: compiled_scaled(momentum)}
        taken = seconds_of(bench, ways)
        what = f"{name}: its norm and scale, op by op and compiled"
        yield Row(what, "ms", 1e3 * taken["before"], 1e3 * taken["after"])

    yield from attempt(f"{name}: as it is", whole)
    yield from attempt(f"{name}: the plain form", in_one)
    yield from attempt(f"{name}: norm and scale", passes)


def scaled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices divided by their norm, as `newton_schulz` begins."""
    norm = torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.float64)
    root = torch.where(norm > 0, norm.rsqrt(), 0.0).to(torch.float32)
    return (x * root * root).to(dtype)
