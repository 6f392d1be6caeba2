"""How busy a node is, measured where its keeper lives: MLflow's system metrics without MLflow on the nodes.

MLflow's own monitor would have every node talk to the tracking server, and cost the keeper its import. The names and
units are MLflow's, so that its UI shows them under "System metrics".
"""

import importlib
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MB = 1e6


class Usage:
    """Measures this machine; rates are since the last sample."""

    def __init__(self) -> None:
        self._gpus = _gpus()
        self._at, self._network = time.monotonic(), psutil.net_io_counters()
        psutil.cpu_percent()  # The first call has nothing to compare with.

    def sample(self) -> dict[str, float]:
        """Return what is used now, by MLflow's names: percent, megabytes, watts."""
        memory, disk, now, network = psutil.virtual_memory(), psutil.disk_usage("/"), time.monotonic(), self._network
        self._network = psutil.net_io_counters()
        seconds, self._at = max(now - self._at, 1e-3), now
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MB,
            "network_receive_megabytes_per_second": (self._network.bytes_recv - network.bytes_recv) / MB / seconds,
            "network_transmit_megabytes_per_second": (self._network.bytes_sent - network.bytes_sent) / MB / seconds,
            **self._gpu_usage(),
        }

    def _gpu_usage(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for index, (nvml, gpu) in enumerate(self._gpus):
            with suppress(Exception):  # A GPU that fails must not end its node's keeper.
                memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
                found[f"gpu_{index}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
                found[f"gpu_{index}_memory_usage_megabytes"] = memory.used / MB
                found[f"gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
                found[f"gpu_{index}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        return found


def _gpus() -> list[tuple[Any, Any]]:
    """Return NVIDIA's library and a handle for each GPU; none where either is missing. Not run on a GPU."""
    try:
        pynvml = importlib.import_module("pynvml")  # Of the extra `gpu`.
        pynvml.nvmlInit()
        return [(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # No driver: the library has an exception of its own for each way in which that shows.
        return []


CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files under /sys/fs/cgroup with a container's limit and use: version 2, version 1."""


def memory_here() -> tuple[int, int]:
    """Return the bytes of memory that this machine or container has, and how many of them are available."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit_file, used_file in CGROUPS:
        with suppress(OSError, ValueError):  # `max` is no number: no limit.
            limit = int(Path("/sys/fs/cgroup", limit_file).read_text())
            used = int(Path("/sys/fs/cgroup", used_file).read_text())
            stat = dict(line.split() for line in Path("/sys/fs/cgroup", limit_file).with_name("memory.stat").open())
            cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # It goes when memory is short.
            total, available = min(total, limit), min(available, limit - used + cached)
    return total, available
