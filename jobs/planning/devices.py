"""A GPU type's data sheet as a calibration, for devices that nobody has measured yet.

Data sheets have peaks; a step gets a share of them. The shares below are assumptions, rounded from what is commonly
reported for eager PyTorch (docs/commands/plan.md); `raymuon doctor --calibration` replaces them by measurements.
"""

import math

from workers.calibrate import Calibration, Collective, Curve
from workers.common.errors import ConfigError
from workers.gpus import GPUS
from workers.work import KINDS

PRODUCT_SHARES = ((64, 0.01), (256, 0.15), (1024, 0.5), (4096, 0.7))
"""Of the peak, by the harmonic mean of a product's sides."""
ATTENTION_SHARE, ATTENTION_BACKWARD_SHARE = 0.5, 0.4
MEMORY_SHARE, LINK_SHARE, NETWORK_SHARE = 0.8, 0.75, 0.8
GATHER_SHARE = 0.3
SECONDS_PER_OP = 6e-6
"""Of an eager op's start, autograd included."""
HOST_BYTES_PER_S = 4e9
"""From the GPU into memory that is not pinned."""
LATENCY_S, LATENCY_BETWEEN_NODES_S = 20e-6, 15e-6
"""Of a collective, and for each doubling of the nodes."""
NETWORK_GBIT = 400.0
"""Of a node, where no other is given."""


def calibration_of(gpu_type: str, gpus: int, gpus_per_node: int, network_gbit: float = NETWORK_GBIT) -> Calibration:
    """Return what the data sheet lets one expect.

    Args:
        gpu_type: a name of `workers.gpus.GPUS`; case, blanks and hyphens do not count.
        gpus: in the group.
        gpus_per_node: of them in a node.
        network_gbit: per second, of a node.

    Raises:
        ConfigError: there is no such type.
    """
    names = {_plain(name): name for name in GPUS}
    if _plain(gpu_type) not in names:
        raise ConfigError(f"--gpu-type {gpu_type}: not in the table; known are {', '.join(GPUS)}")
    name = names[_plain(gpu_type)]
    gpu = GPUS[name]
    peak, memory = gpu.tflops * 1e12, gpu.memory_gb_per_s * 1e9 * MEMORY_SHARE
    flat = {
        "attention": peak * ATTENTION_SHARE,
        "attention_backward": peak * ATTENTION_BACKWARD_SHARE,
        "elementwise": memory,
        "special": memory,
        "gather": memory * GATHER_SHARE,
    }
    products = Curve(tuple(size for size, _ in PRODUCT_SHARES), tuple(peak * share for _, share in PRODUCT_SHARES))
    curves = {"matmul": products, **{kind: Curve((1.0,), (rate,)) for kind, rate in flat.items()}}
    assert set(curves) == set(KINDS)
    wire, nodes = gpu.link_gb_per_s / 2 * 1e9 * LINK_SHARE, -(-gpus // gpus_per_node)
    if nodes > 1:  # A ring crosses each node's border once, over all its adapters.
        wire = min(wire, network_gbit / 8 * 1e9 * NETWORK_SHARE)
    latency = LATENCY_S + LATENCY_BETWEEN_NODES_S * math.log2(nodes)
    calls = ("all_reduce", "reduce", "all_gather", "all_to_all")
    return Calibration(
        device=f"{name} (data sheet)",
        kind="cuda",
        precision="bf16",
        memory_bytes=gpu.memory_gb * 10**9,
        seconds_per_op=SECONDS_PER_OP,
        curves=curves,
        host_bytes_per_s=HOST_BYTES_PER_S,
        collectives=tuple(Collective(call, gpus, latency, wire) for call in calls) if gpus > 1 else (),
    )


def _plain(name: str) -> str:
    return "".join(name.lower().split()).replace("-", "")
