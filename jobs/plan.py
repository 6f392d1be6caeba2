"""`raymuon plan`: what the optimizer will do at a number of GPUs, before one is rented."""

from dataclasses import dataclass

from optim.layout import GroupLayout
from optim.plan import matrices_of, plan_orthogonalization
from orchestrator.config import RunConfig
from workers.errors import ConfigError

WIRE_BYTES = {"auto": 2, "bf16": 2, "fp32": 4}
PARAMETER_BYTES = 2
"""bf16, in which parameters are gathered."""


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
    """Plan the matrices of the config's model over so many ranks.

    Raises:
        ConfigError: there is nothing to plan.
    """
    import torch

    from optim.routing import parameter_groups
    from workers.models import build_empty

    with torch.device("meta"):
        model = build_empty(config.model)
    groups = parameter_groups(model.named_parameters(), config.optim.name, model.matrix_parts(config.optim.split))
    group = next((group for group in groups if group["method"] == "muon"), None)
    if group is None:
        raise ConfigError(f"optim.name={config.optim.name}: no matrix is orthogonalized")
    layout = GroupLayout.of(group["names"], [p.numel() for p in group["params"]], gpus)
    cost = config.optim.operations
    plan = plan_orthogonalization(layout, matrices_of(layout, group["matrices"]), cost)
    sent, wire = plan.elements_sent(), WIRE_BYTES[config.optim.wire_dtype]
    work = [sum(cost(rows, columns) for rows, columns in plan.matrices(rank)) for rank in range(gpus)]
    gathered = PARAMETER_BYTES * (layout.partition * (gpus - 1))
    return OrthogonalizationPlan(
        gpus=gpus,
        matrices=sum(1 for rank in range(gpus) for _ in plan.matrices(rank)),
        straddlers=len(plan.straddlers),
        bytes_each_way=wire * sum(sent) // 2,
        worst_share_of_all_gather=wire * max(sent) / gathered if gathered else 0.0,
        operations=sum(work),
        worst_operations=max(work),
    )
