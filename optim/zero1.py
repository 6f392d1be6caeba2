"""Distributed Muon as a client optimizer of DeepSpeed's ZeRO-1.

DeepSpeed replaces each group's parameters by one flat fp32 tensor, this rank's partition, and calls `step()` with the
reduced, unscaled and clipped gradient in its `.grad`. `bind()` is called once after `deepspeed.initialize` and learns
from DeepSpeed's own map which piece of which matrix lies in the partition; nothing of DeepSpeed is changed.

A step of the Muon group: momentum on the local shard; pieces of straddling matrices fly to their owners while the
matrices that lie whole here are orthogonalized; then the straddlers; their slices fly back; weight decay and update.
Every matrix is orthogonalized once in the whole group, and the momentum is kept once.

The class's name has no "muon" in it, and no parameter gets an attribute `use_muon`: DeepSpeed would take either for
its own Muon and orthogonalize a second time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from optim.config import OptimConfig
from optim.layout import Fragment, GroupLayout
from optim.newton_schulz import Workspace, newton_schulz
from optim.plan import Batch, OrthogonalizePlan, Piece, matrices_of, plan_orthogonalization
from optim.polynomials import Form, coefficients
from optim.routing import matrix_shape, parameter_groups

STATE_KEYS = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
"""The flat state tensors of each method."""
BATCH_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 26}
"""Of the matrices that are orthogonalized at once: so many that a CPU keeps them in its caches, and a GPU is busy."""


class LayoutError(RuntimeError):
    """DeepSpeed laid a group out otherwise than `optim.layout` says; training would be silently wrong."""


@dataclass(frozen=True)
class FlatState:
    """One group's part on this rank: `fragments` say what lies where in each of the flat `tensors`."""

    fragments: list[Fragment]
    tensors: dict[str, Tensor]


class Zero1Optimizer(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, on flat ZeRO-1 shards.

    Args:
        named_parameters: of the module, before DeepSpeed sees it.
        config: its settings; `lr` of the groups is set by the caller before each step.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.config = config
        groups = parameter_groups(named_parameters, config.name)
        self._parameters: list[list[nn.Parameter]] = [list(group["params"]) for group in groups]
        self.plan: OrthogonalizePlan | None = None
        """Of the matrices; known once it is bound."""
        self._layouts: dict[str, GroupLayout] = {}
        self._exchanges: dict[str, _Exchange] = {}
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})

    def bind(self, zero_optimizer: Any) -> None:
        """Learn the layout of DeepSpeed's wrapper (`engine.optimizer`) and create all state, before the first step.

        DeepSpeed links optimizer state once, after the first group's first step: state that is created later would be
        invisible to `safe_get_full_optimizer_state`.

        Raises:
            LayoutError: the wrapper's partition is not the one that `optim.layout` computes.
        """
        for index, (group, parameters) in enumerate(zip(self.param_groups, self._parameters, strict=True)):
            process_group = zero_optimizer.real_dp_process_group[index]
            rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
            layout = GroupLayout.of(group["names"], [p.numel() for p in parameters], world_size)
            (shard,) = group["params"]
            _check_layout(layout, rank, parameters, shard)
            method = group["method"]
            self._layouts[method] = layout
            self.state[shard].update({key: torch.zeros_like(shard) for key in STATE_KEYS[method]})
            if method == "adamw":
                self.state[shard]["step"] = torch.zeros((), dtype=torch.float32, device=shard.device)
            else:
                shapes = [matrix_shape(tuple(p.shape)) for p in parameters]
                self.plan = plan_orthogonalization(layout, matrices_of(layout, shapes), self.config.operations)
                self._exchanges[method] = _Exchange(self.plan, self.config, process_group, shard.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the shards of `param_groups`: all of them, or the one that DeepSpeed leaves visible."""
        for group in self.param_groups:
            (shard,) = group["params"]
            if group["method"] == "muon":
                self._muon(group, shard)
            else:
                self._adamw(group, shard)

    def flat_state(self, rank: int) -> Iterator[FlatState]:
        """Yield each group's master weights (`weight`) and state on this rank; the tensors are live views."""
        for group in self.param_groups:
            (shard,) = group["params"]
            tensors = {key: self.state[shard][key] for key in STATE_KEYS[group["method"]]}
            yield FlatState(self._layouts[group["method"]].fragments(rank), {"weight": shard.detach(), **tensors})

    def layouts(self, world_size: int) -> Iterator[tuple[GroupLayout, tuple[str, ...]]]:
        """Yield each group's layout at any world size and the kinds of its flat tensors, in `flat_state`'s order."""
        for group in self.param_groups:
            layout = self._layouts[group["method"]]
            yield (
                GroupLayout.of(layout.names, layout.numels, world_size),
                ("weight", *STATE_KEYS[group["method"]]),
            )

    @property
    def applied_steps(self) -> int:
        """Steps that AdamW's bias correction has counted; skipped steps are not among them."""
        return next((int(state["step"]) for state in self.state.values() if "step" in state), 0)

    @applied_steps.setter
    def applied_steps(self, steps: int) -> None:
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def _muon(self, group: dict[str, Any], shard: Tensor) -> None:
        config = self.config
        momentum: Tensor = self.state[shard]["momentum_buffer"]
        direction: Tensor = shard.grad  # type: ignore[assignment]
        momentum.lerp_(direction, 1 - config.momentum)
        # The gradient is not needed any more: its memory takes the look-ahead.
        direction = direction.lerp_(momentum, config.momentum) if config.nesterov else momentum
        shard.mul_(1 - group["lr"] * group["weight_decay"])
        self._exchanges["muon"].descend(shard, direction, group["lr"] * config.update_rms)

    def _adamw(self, group: dict[str, Any], shard: Tensor) -> None:
        config, state = self.config, self.state[shard]
        adamw(
            [shard],
            [shard.grad],  # type: ignore[list-item]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=config.eps,
            maximize=False,
        )


class _Exchange:
    """Carries out one group's plan on this rank: what is packed, sent, orthogonalized and sent back."""

    def __init__(
        self, plan: OrthogonalizePlan, config: OptimConfig, process_group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self.group = process_group
        self.device = device
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtypes = {"auto": auto, "bf16": torch.bfloat16, "fp32": torch.float32}
        self.ns_dtype, self.wire_dtype = dtypes[config.ns_dtype], dtypes[config.wire_dtype]
        # A GPU's allocator keeps its memory anyway.
        self.workspace = Workspace() if device.type == "cpu" else None
        self.polynomials = coefficients(config.ns_coefficients, config.ns_steps)
        self.form: Form | None = config.form
        self.rank = dist.get_rank(process_group)
        peers = range(dist.get_world_size(process_group))
        self.sent = [plan.sent(self.rank, peer) for peer in peers]
        self.received = [plan.sent(peer, self.rank) for peer in peers]
        self.straddlers = plan.straddlers
        self.owned = [index for index, matrix in enumerate(plan.straddlers) if matrix.owner == self.rank]
        self.batches = [part for batch in plan.local[self.rank] for part in _cut(batch, BATCH_ELEMENTS[device.type])]

    def descend(self, shard: Tensor, direction: Tensor, rate: float) -> None:
        """Subtract `rate sqrt(max(A, B)) O` from every matrix `[A, B]` in the flat shard (Moonlight, equation 4).

        Args:
            shard: this rank's weights.
            direction: what is orthogonalized to O; alike. It is not changed.
            rate: learning rate times the update's RMS.
        """
        outgoing = [direction[p.offset : p.offset + p.length] for peer in self.sent for p in peer]
        gathered, arrival = self._all_to_all(outgoing, self.sent, self.received)
        for batch in self.batches:
            size, stride = (batch.count, batch.rows, batch.columns), (batch.stride, batch.columns, 1)
            matrices = direction.as_strided(size, stride, direction.storage_offset() + batch.offset)
            orthogonal = self._newton_schulz(matrices, self.workspace)
            weights = shard.as_strided(size, stride, shard.storage_offset() + batch.offset)
            weights.add_(orthogonal, alpha=-rate * max(batch.rows, batch.columns) ** 0.5)
        if arrival is None:
            return

        arrival.wait()
        pieces = iter(gathered.split([p.length for peer in self.received for p in peer]))
        arrived = {(p.matrix, p.position): next(pieces) for peer in self.received for p in peer}
        results: dict[int, Tensor] = {}
        for index in self.owned:
            matrix = self.straddlers[index]
            parts = [
                direction[p.offset : p.offset + p.length]
                if p.holder == self.rank
                else arrived[index, p.position].to(direction.dtype)
                for p in matrix.pieces
            ]
            results[index] = self._newton_schulz(torch.cat(parts).view(1, matrix.rows, matrix.columns)).flatten()

        answers = [results[p.matrix][p.position : p.position + p.length] for peer in self.received for p in peer]
        returned, arrival = self._all_to_all(answers, self.received, self.sent)
        own = [p for index in self.owned for p in self.straddlers[index].pieces if p.holder == self.rank]
        self._subtract(shard, own, (results[p.matrix][p.position : p.position + p.length] for p in own), rate)
        arrival.wait()  # type: ignore[union-attr]
        mine = [p for peer in self.sent for p in peer]
        self._subtract(shard, mine, returned.split([p.length for p in mine]), rate)

    def _subtract(self, shard: Tensor, pieces: Iterable[Piece], slices: Iterable[Tensor], rate: float) -> None:
        for p, orthogonal in zip(pieces, slices, strict=True):
            matrix = self.straddlers[p.matrix]
            scale = rate * max(matrix.rows, matrix.columns) ** 0.5
            shard[p.offset : p.offset + p.length].add_(orthogonal, alpha=-scale)

    def _newton_schulz(self, matrices: Tensor, workspace: Workspace | None = None) -> Tensor:
        return newton_schulz(matrices, self.polynomials, self.form, self.ns_dtype, workspace)

    def _all_to_all(
        self, pieces: list[Tensor], sent: list[list[Piece]], received: list[list[Piece]]
    ) -> tuple[Tensor, dist.Work | None]:
        """Start sending `pieces` (nothing happens where the group has no straddlers) and return what will arrive."""
        send_sizes = [sum(p.length for p in peer) for peer in sent]
        receive_sizes = [sum(p.length for p in peer) for peer in received]
        packed = torch.cat(pieces) if pieces else torch.empty(0, device=self.device)
        arrived = torch.empty(sum(receive_sizes), dtype=self.wire_dtype, device=self.device)
        if not self.straddlers:
            return arrived, None
        packed = packed.to(self.wire_dtype)
        work = dist.all_to_all_single(arrived, packed, receive_sizes, send_sizes, group=self.group, async_op=True)
        return arrived, work


def _cut(batch: Batch, elements: int) -> Iterator[Batch]:
    """Cut a batch into parts of at most so many elements, but of one matrix at least."""
    most = max(1, elements // (batch.rows * batch.columns))
    for first in range(0, batch.count, most):
        yield replace(batch, offset=batch.offset + first * batch.stride, count=min(most, batch.count - first))


def _check_layout(layout: GroupLayout, rank: int, parameters: list[nn.Parameter], shard: Tensor) -> None:
    """Compare our layout with DeepSpeed's fragment map, parameter by parameter."""
    if shard.numel() != layout.partition:
        raise LayoutError(f"DeepSpeed's partition has {shard.numel()} elements, the layout {layout.partition}")
    ours = {fragment.name: fragment for fragment in layout.fragments(rank)}
    for name, parameter in zip(layout.names, parameters, strict=True):
        mapping, fragment = parameter._hp_mapping, ours.get(name)  # type: ignore[attr-defined]
        theirs = mapping and (
            mapping.lp_fragment_address.start,
            mapping.lp_fragment_address.numel,
            mapping.hp_fragment_address.start,
        )
        expected = fragment and (fragment.start, fragment.length, fragment.offset)
        if theirs != expected:
            raise LayoutError(
                f"DeepSpeed put {name} at (start, length, offset) {theirs}, the layout says {expected}; "
                "round_robin_gradients and parameter_alignment must stay off"
            )
