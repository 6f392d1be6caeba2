"""A process in a worker's place: the same reservation, imports and process group, but it only measures."""

import importlib
from typing import TYPE_CHECKING

import ray

from jobs.doctor.seen import LinkSeen, SlotSeen
from optim.config import OptimConfig
from workers.actor import see_own_gpus
from workers.config import ModelConfig
from workers.member import Member

if TYPE_CHECKING:
    from workers.calibrate import Collective

ROUNDS = 20
"""Of a large product; the best counts, as anything else on the machine only slows it."""


class SlotProbe(Member):
    """One worker slot. `prepare` comes first: it imports torch and deepspeed."""

    def __init__(self) -> None:
        see_own_gpus()
        super().__init__(ray.util.get_node_ip_address())
        self._collectives: tuple[Collective, ...] = ()

    def measure(self, node: str) -> SlotSeen:
        """Return what this slot's device is and how fast it multiplies; `node` is its name."""
        import torch

        from workers.engine import default_device
        from workers.gpus import measured_tflops

        device = default_device()
        cuda = device.type == "cuda"
        libraries = {}
        if cuda:
            nccl = ".".join(map(str, importlib.import_module("torch.cuda.nccl").version()))
            libraries = {"CUDA": str(torch.version.cuda), "NCCL": nccl}
        return SlotSeen(
            node=node,
            tflops=measured_tflops(device, ROUNDS),
            device=torch.cuda.get_device_name(device) if cuda else f"a CPU with {torch.get_num_threads()} thread(s)",
            libraries=libraries,
        )

    def link(self, members: tuple[str, ...], rank: int, host: str, port: int) -> LinkSeen:
        """Form a process group as a generation does, and measure its collectives.

        Args:
            members: nodes of the group, by rank.
            rank: this process's.
            host: of rank 0, which has opened the rendezvous.
            port: of the rendezvous.
        """
        from torch.distributed import TCPStore

        from workers.calibrate import measure_collectives
        from workers.engine import default_device, join_process_group, leave_process_group

        store = TCPStore(host, port, len(members), is_master=False)
        device = default_device()
        try:
            join_process_group(rank, len(members), store, device)
            found = measure_collectives(None, device)
        finally:
            leave_process_group()
            self._store = None
        self._collectives += found
        reduced = next(one for one in found if one.name == "all_reduce")
        return LinkSeen(
            members=members,
            backend="nccl" if device.type == "cuda" else "gloo",
            latency_s=reduced.latency_s,
            bytes_per_s=reduced.bytes_per_s,
        )

    def snapshot_bytes(self, model: ModelConfig, optim: OptimConfig, world_size: int) -> int:
        """Return the bytes of a rank's snapshot, as the plan has them; the driver has no torch to find out."""
        from jobs.planning.state import layout_of

        return layout_of(model, optim, world_size).snapshot.values

    def calibrate(self) -> str:
        """Measure the device as `raymuon plan` wants it; all slots of a machine at the same time.

        Returns:
            The calibration as text: the driver has no torch to read it with.
        """
        from workers.calibrate import measure_device
        from workers.engine import default_device

        return measure_device(default_device()).with_collectives(self._collectives).to_json()

    def calibration_of(self, texts: list[str]) -> str:
        """Return the median of the calibrations that are of the first one's device."""
        from workers.calibrate import Calibration

        first, *others = map(Calibration.from_json, texts)
        return first.with_speed_of([one for one in others if one.device == first.device]).to_json()
