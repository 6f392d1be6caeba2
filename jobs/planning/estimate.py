"""Parts of a plan: the memory, the traffic and the time of a config on machines, where nothing in it is automatic."""

from dataclasses import dataclass

from jobs.planning.devices import NETWORK_GBIT, calibration_of
from jobs.planning.memory import PROCESS_BYTES, Memory, memory_of
from jobs.planning.state import layout_of, num_blocks
from jobs.planning.timing import StepTime, step_time
from jobs.planning.traffic import traffic_of
from jobs.planning.work import MicroBatch, micro_batch_of
from optim.exchange import dtype_on
from orchestrator.config import RunConfig
from workers.calibrate import Calibration
from workers.common.errors import ConfigError

GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Machines:
    """On what a run is planned."""

    gpus: int
    """Data-parallel ranks: GPUs, or processors."""
    gpus_per_node: int = GPUS_PER_NODE
    gpu_type: str = ""
    """A name of the table of data sheets, where nothing is measured."""
    calibration: Calibration | None = None
    network_gbit: float = NETWORK_GBIT
    """Per second and node; for `gpu_type` alone."""

    @property
    def known(self) -> bool:
        """Tell whether anything is known of the device."""
        return bool(self.gpu_type) or self.calibration is not None

    def device(self) -> Calibration:
        """Return the device's figures.

        Raises:
            ConfigError: neither or both are given, or the type is unknown.
        """
        if bool(self.gpu_type) == (self.calibration is not None):
            raise ConfigError("a plan needs --gpu-type NAME or --calibration FILE, and not both")
        if self.calibration is not None:
            return self.calibration
        return calibration_of(self.gpu_type, self.gpus, self.gpus_per_node, self.network_gbit)


def memory_on(config: RunConfig, machines: Machines, device: Calibration) -> Memory:
    """Return the memory alone; on a CPU a step that is measured writes all attention scores."""
    layout = layout_of(config.model, config.optim, machines.gpus)
    watched = device.kind == "cpu" and bool(config.telemetry.every or config.optim.qk_clip)
    micro, ranks_per_node = _micro_batch(config, device.kind, watched), min(machines.gpus, machines.gpus_per_node)
    return memory_of(layout, micro, config.train, config.optim, device.kind, ranks_per_node)


def time_on(config: RunConfig, machines: Machines, device: Calibration) -> StepTime:
    """Return the time of a step alone."""
    layout = layout_of(config.model, config.optim, machines.gpus)
    micro, sent = _micro_batch(config, device.kind, config.optim.qk_clip > 0), sent_on(config, machines, device)
    return step_time(layout, micro, sent, config.train, config.optim, config.checkpoint, device)


def needed_on(memory: Memory, machines: Machines, device: Calibration) -> int:
    """Return the bytes of device memory; of processors, of a whole machine with its keeper."""
    if device.kind == "cuda":
        return memory.peak
    ranks = min(machines.gpus, machines.gpus_per_node)
    return ranks * (memory.peak + PROCESS_BYTES) + memory.keeper_bytes_per_node


def sent_on(config: RunConfig, machines: Machines, device: Calibration) -> dict[str, float]:
    """Return the bytes that the mean rank sends in DeepSpeed's step, by collective."""
    train, layout = config.train, layout_of(config.model, config.optim, machines.gpus)
    itemsize, wire = (dtype_on(device.kind, of).itemsize for of in (train.precision, config.optim.wire_dtype))
    return traffic_of(layout, itemsize, wire)


def _micro_batch(config: RunConfig, kind: str, watched: bool) -> MicroBatch:
    train, dtype = config.train, dtype_on(kind, config.train.precision)
    return micro_batch_of(
        *(config.model, train.micro_batch, train.seq_len, dtype, kind, watched, config.data.masks_documents),
        train.recomputed(num_blocks(config.model)),
        train.logits == "chunked",
    )


def gigabytes(nbytes: float) -> str:
    """Return bytes for people."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.1f} MB"
