"""How fast devices multiply matrices, and what their data sheets say."""

import functools
import re
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """A type of GPU as its data sheet has it."""

    tflops: float
    """Peak of dense products in bf16 with fp32 sums, without sparsity."""
    memory_gb: int
    memory_gb_per_s: float
    link_gb_per_s: float
    """To the other GPUs of its node, both directions together: NVLink, or else PCI Express."""


GPUS = {
    "B200": Gpu(2250.0, 180, 8000.0, 1800.0),
    "GH200": Gpu(989.0, 96, 4000.0, 900.0),
    "H200 NVL": Gpu(835.0, 141, 4800.0, 900.0),
    "H200": Gpu(989.0, 141, 4800.0, 900.0),
    "H100 PCIe": Gpu(756.0, 80, 2000.0, 128.0),
    "H100 NVL": Gpu(835.0, 94, 3900.0, 600.0),
    "H100": Gpu(989.0, 80, 3350.0, 900.0),
    "H800": Gpu(989.0, 80, 3350.0, 400.0),
    "H20": Gpu(148.0, 96, 4000.0, 900.0),
    "A100 40GB": Gpu(312.0, 40, 1555.0, 600.0),
    "A100": Gpu(312.0, 80, 2039.0, 600.0),
    "A800": Gpu(312.0, 80, 2039.0, 400.0),
    "L40S": Gpu(362.0, 48, 864.0, 64.0),
    "L40": Gpu(181.0, 48, 864.0, 64.0),
    "L4": Gpu(121.0, 24, 300.0, 64.0),
    "A10G": Gpu(70.0, 24, 600.0, 64.0),
    "A10": Gpu(125.0, 24, 600.0, 64.0),
    "RTX 4090": Gpu(165.0, 24, 1008.0, 64.0),
}
"""By words of the device's name; the first all of whose words are there counts. From NVIDIA's data sheets and product
pages; of the A100 with 80 GB that on SXM, of the A800 the larger, of GH200 that with HBM3."""
BF16_TFLOPS = {name: gpu.tflops for name, gpu in GPUS.items()}
"""Peaks alone."""


def type_of(device: str) -> str:
    """Return the name in `GPUS` of a device that calls itself so; "" where it is not there."""
    words = set(re.split(r"\W+", device))  # Between "A100" and "40GB" stands how it is plugged in.
    return next((name for name in GPUS if words.issuperset(name.split())), "")


def peak_tflops(device: torch.device) -> float:
    """Return the peak of one device: of a known GPU as published, of any other device as measured now.

    Returns:
        10^12 floating-point operations per second; bf16 on a GPU, fp32 on a CPU with the process's threads.
    """
    if device.type == "cuda" and (known := type_of(torch.cuda.get_device_name(device))):
        return BF16_TFLOPS[known]
    return measured_tflops(device)


@functools.lru_cache(maxsize=1)
def measured_tflops(device: torch.device, rounds: int = 5) -> float:
    """Return the best rate of some large matrix products."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (768, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        if cuda:
            torch.cuda.synchronize(device)
        clock = time.perf_counter()
        torch.mm(a, a)
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - clock)
    return 2 * size**3 / best / 1e12
