"""What the probes bring back. Plain data without torch: the driver reads it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class NodeSeen:
    """A node, as a process on it sees it; memory in bytes."""

    versions: dict[str, str]
    """Of Python, the libraries that a run computes with, and `raymuon code`, a digest over the four packages."""
    cpus: int
    memory: int
    """Of the machine, or what the container may use of it."""
    available: int
    """Of `memory`, what new pages can be had from."""
    shm: int
    """Size of /dev/shm."""
    gpus: tuple[str, ...] = ()
    """Names of the GPUs that the driver shows."""
    driver: str = ""
    """NVIDIA's, where there is a GPU."""
    max_files: int
    """Files that a process may have open."""
    token_mode: str
    """RAY_AUTH_MODE of Ray's processes: `token` or `disabled`."""
    token_file: str = ""
    """The token's file, where others than its owner may read it."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node, as Ray describes it."""

    node: str
    """Name for people."""
    cpus: float
    gpus: float
    slots: int
    """Workers of this run that it could hold if it were empty."""
    object_store: int
    """Bytes of Ray's object store."""


@dataclass(frozen=True, kw_only=True)
class SlotSeen:
    """A process in a worker's place that has imported all that training needs."""

    node: str
    tflops: float
    """10^12 operations per second of large products: bf16 on a GPU, fp32 on a CPU; all slots at the same time."""
    device: str
    libraries: dict[str, str] = field(default_factory=dict)
    """CUDA and NCCL as torch was built with, where the slot has a GPU."""


@dataclass(frozen=True, kw_only=True)
class LinkSeen:
    """A process group: all slots, or one slot of each of two nodes."""

    members: tuple[str, ...]
    """Nodes, by rank."""
    backend: str
    latency_s: float
    """Of a small all-reduce."""
    bytes_per_s: float
    """That a rank sends in a large all-reduce."""


@dataclass(frozen=True, kw_only=True)
class ClockSeen:
    """A node's clock against the driver's."""

    offset_s: float
    """How much it is ahead."""
    round_trip_s: float
    """Of the exchange; the offset is right to half of it."""


@dataclass(frozen=True, kw_only=True)
class PlaceSeen:
    """A folder under an fsspec URL, as one node reaches it."""

    error: str = ""
    """What went wrong, and how to mend it; the rest does not count then."""
    fences: bool = True
    """A second create of the same name was refused."""
    write_bytes_per_s: float = 0.0
    read_bytes_per_s: float = 0.0
    skew_s: float | None = None
    """How much the store's clock is ahead of this node's; None where it does not tell."""


@dataclass(frozen=True, kw_only=True)
class TrackingSeen:
    """An MLflow server or database, as the driver reaches it."""

    uri: str
    error: str = ""
    status: int = 0
    """HTTP status of a refusal; 0 where there was none."""
    doing: str = ""
    """What was being tried when it went wrong; empty where nobody was reached."""
    seconds: float = 0.0
    """For all that was tried."""
    server: str = ""
    """Version; empty where there is no server, or it does not tell."""
    client: str = ""
    left: str = ""
    """What could not be deleted."""
    note: str = ""
    """What was not tried, and why."""

    @property
    def unreachable(self) -> bool:
        """Tell whether it went wrong before anything was tried."""
        return bool(self.error) and not self.doing
