"""How the optimizer shares its matrices out over the ranks."""

from dataclasses import dataclass

from jobs.planning.state import Layout, layout_of, orthogonalization_of
from optim.config import OptimConfig
from optim.plan import OrthogonalizePlan
from orchestrator.config import RunConfig
from workers.errors import ConfigError

BF16 = 2
"""Bytes of a parameter where no device is named."""


@dataclass(frozen=True)
class OrthogonalizationPlan:
    """How the matrices are shared out over `gpus` ranks."""

    gpus: int
    matrices: int
    straddlers: int
    bytes_each_way: int
    """Of straddlers' pieces to their owners, all ranks together; as many come back."""
    worst_share_of_all_gather: float
    """What the busiest rank sends for straddlers, both ways, over what it sends in the parameters' all-gather."""
    operations: int
    """Of Newton-Schulz in a step, all ranks together."""
    worst_operations: int
    """Of the busiest rank."""

    @property
    def imbalance(self) -> float:
        """The busiest rank's operations over the mean."""
        return self.worst_operations * self.gpus / self.operations


def orthogonalization(config: RunConfig, gpus: int) -> OrthogonalizationPlan:
    """Plan the matrices of the config's model over so many GPUs.

    Raises:
        ConfigError: there is nothing to plan.
    """
    layout = layout_of(config.model, config.optim, config.train.seq_len, gpus)
    plan = orthogonalization_of(layout, config.optim)
    if plan is None:
        raise ConfigError(f"optim.name={config.optim.name}: no matrix is orthogonalized")
    return shared_out(layout, plan, config.optim, BF16, wire_bytes(config.optim, "cuda"))


def wire_bytes(optim: OptimConfig, kind: str) -> int:
    """Return the bytes of an element of a straddler on its way to its owner, between devices of a kind."""
    return {"auto": 2 if kind == "cuda" else 4, "bf16": 2, "fp32": 4}[optim.wire_dtype]


def shared_out(
    layout: Layout, plan: OrthogonalizePlan, optim: OptimConfig, itemsize: int, wire: int
) -> OrthogonalizationPlan:
    """Return the figures of a plan over GPUs.

    Args:
        layout: of the parameters.
        plan: of the matrices.
        optim: the optimizer's settings.
        itemsize: bytes of a weight.
        wire: bytes of an element of a straddler on its way.
    """
    gpus, sent = len(plan.local), plan.elements_sent()
    work = [sum(optim.operations(rows, columns) for rows, columns in plan.matrices(rank)) for rank in range(gpus)]
    partition = next(group.layout.partition for group in layout.groups if group.method == "muon")
    gathered = itemsize * partition * (gpus - 1)
    return OrthogonalizationPlan(
        gpus=gpus,
        matrices=sum(1 for rank in range(gpus) for _ in plan.matrices(rank)),
        straddlers=len(plan.straddlers),
        bytes_each_way=wire * sum(sent) // 2,
        worst_share_of_all_gather=wire * max(sent) / gathered if gathered else 0.0,
        operations=sum(work),
        worst_operations=max(work),
    )
