"""The run's parameters as ZeRO-1 lays them out: what memory, traffic and optimizer work are computed from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from optim.assignment import OrthogonalizePlan, PlanFigures, matrices_of, plan_orthogonalization
from optim.config import OptimConfig
from optim.layout import GroupLayout
from optim.mup import Parametrization, Step
from optim.routing import parameter_groups
from optim.zero1 import kinds_of
from workers.config import ModelConfig
from workers.models import build_empty
from workers.models.layers import replicated
from workers.snapshots.kept import ShardMap
from workers.snapshots.region import RegionSize


@dataclass(frozen=True)
class Group:
    """An optimizer group over all ranks."""

    method: str
    layout: GroupLayout
    matrices: tuple[tuple[tuple[int, int], ...], ...]
    """Rows and columns of the matrices in each parameter."""


@dataclass(frozen=True)
class Layout:
    """All groups, and what is beside them."""

    groups: tuple[Group, ...]
    buffer_bytes: int
    """Of what the module keeps beside its parameters."""
    snapshot: RegionSize
    """Of a rank: fp32 master weights and optimizer state, and what is replicated."""
    flops_per_token: Callable[[int], float]
    """Of training on sequences of so many tokens, without recomputation."""
    expert_loads: int
    """Numbers of tokens per expert, in all layers."""
    plan: OrthogonalizePlan | None
    """Who orthogonalizes what; None where nothing is."""

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(sum(group.layout.numels) for group in self.groups)

    @property
    def partition(self) -> int:
        """Elements of a rank's part of all groups, padding included."""
        return sum(group.layout.partition for group in self.groups)

    @property
    def tensors(self) -> int:
        """Parameters, counted as tensors."""
        return sum(len(group.layout.names) for group in self.groups)

    @property
    def state_bytes(self) -> int:
        """Of fp32 master weights and optimizer state on every rank."""
        return self.snapshot.shard

    def plan_figures(self, optim: OptimConfig, itemsize: int, wire: int) -> PlanFigures | None:
        """Return what the plan comes to.

        Args:
            optim: the optimizer's settings.
            itemsize: bytes of a weight.
            wire: bytes of an element of a straddler on its way.
        """
        if self.plan is None:
            return None
        partition = next(group.layout.partition for group in self.groups if group.method == "muon")
        return self.plan.figures(partition, optim.operations, itemsize, wire)

    def whole_in_partition(self, rank: int) -> int:
        """Return the elements of all parameters of which the rank holds anything, counted whole."""
        return sum(
            dict(zip(group.layout.names, group.layout.numels, strict=True))[fragment.name]
            for group in self.groups
            for fragment in group.layout.fragments(rank)
        )


@lru_cache(maxsize=32)
def num_blocks(model_config: ModelConfig) -> int:
    """Return how many layers can be computed again."""
    with torch.device("meta"):
        return len(build_empty(model_config).blocks)


@lru_cache(maxsize=32)
def layout_of(model_config: ModelConfig, optim: OptimConfig, world_size: int) -> Layout:
    """Lay the model's parameters out over so many ranks.

    Raises:
        ConfigError: the optimizer's rule of widths does not go with the model.
    """
    with torch.device("meta"):
        model = build_empty(model_config)
    rule, groups = model.parametrization(optim), []
    for group in parameter_groups(
        model.named_parameters(), optim.name, model.tables(), model.matrix_parts(optim.split)
    ):
        layout = GroupLayout.of(group["names"], [p.numel() for p in group["params"]], world_size)
        groups.append(Group(group["method"], layout, tuple(tuple(held) for held in group["matrices"])))
    flat = [(group.layout, kinds_of(group.method)) for group in groups]
    sizes = {name: buffer.numel() for name, buffer in replicated(model).items()}
    return Layout(
        tuple(groups),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        snapshot=ShardMap.of(flat, sizes, rank=0).size,
        flops_per_token=model.flops_per_token,
        expert_loads=model.expert_load().numel(),
        plan=next((_plan(group, optim, rule) for group in groups if group.method == "muon"), None),
    )


def _plan(group: Group, optim: OptimConfig, rule: Parametrization) -> OrthogonalizePlan:
    def step(name: str, rows: int, columns: int) -> Step:
        return rule.step(name, "muon", rows, columns)

    return plan_orthogonalization(group.layout, matrices_of(group.layout, group.matrices, step), optim.operations)
