"""How fast devices multiply matrices."""

import functools
import re
import time

import torch

BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
}
"""Peak of dense products in bf16 with fp32 sums, by words of the device's name (NVIDIA's data sheets, without
sparsity); the first that is there counts."""


def peak_tflops(device: torch.device) -> float:
    """Return the peak of one device: of a known GPU as published, of any other device as measured now.

    Returns:
        10^12 floating-point operations per second; bf16 on a GPU, fp32 on a CPU with the process's threads.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tflops in BF16_TFLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return tflops
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
