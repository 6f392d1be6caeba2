"""Distributed Muon as a client optimizer of DeepSpeed's ZeRO-1.

DeepSpeed replaces each group's parameters by one flat fp32 tensor, this rank's partition, and calls `step()` with the
reduced, unscaled and clipped gradient in its `.grad`. `bind()` is called once after `deepspeed.initialize` and learns
from DeepSpeed's own map which piece of which matrix lies in the partition; nothing of DeepSpeed is changed.

Every matrix is orthogonalized once in the whole group (`optim.exchange`), and the momentum is kept once.

The class's name has no "muon" in it, and no parameter gets an attribute `use_muon`: DeepSpeed would take either for
its own Muon and orthogonalize a second time.
"""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from optim.assignment import PlanFigures, matrices_of, plan_orthogonalization
from optim.config import OptimConfig
from optim.exchange import Exchange
from optim.layout import Fragment, GroupLayout
from optim.mup import STANDARD, Parametrization, Step, stretches
from optim.qk_clip import HeadRows, HeadSlice, clip, factors, slices_of
from optim.routing import parameter_groups

STATE_KEYS = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
"""The flat state tensors of each method."""


def kinds_of(method: str) -> tuple[str, ...]:
    """Return the kinds of all flat tensors of a method: the master weights, and its state."""
    return ("weight", *STATE_KEYS[method])


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
        tables: names of parameters that are tables of vectors, not matrices: AdamW's.
        parts: rows of each matrix of its own within a parameter, by name.
        heads: rows of each attention head, for QK-Clip.
        parametrization: how rates and decays follow the model's width.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        tables: Collection[str],
        parts: Mapping[str, Sequence[int]] | None = None,
        heads: Sequence[HeadRows] = (),
        parametrization: Parametrization = STANDARD,
    ) -> None:
        if "muon" in type(self).__name__.lower():
            raise LayoutError(f"{type(self).__name__}: DeepSpeed takes a class with muon in its name for its own Muon")
        self.config = config
        groups = parameter_groups(named_parameters, config.name, tables, parts)
        self._parameters: list[list[nn.Parameter]] = [list(group["params"]) for group in groups]
        self._layouts: dict[str, GroupLayout] = {}
        self._heads = heads
        self.parametrization = parametrization
        self._stretches: dict[Step, list[tuple[int, int]]] = {}
        self._slices: dict[str, list[HeadSlice]] = {}
        self.max_logits: Sequence[float] = ()
        """Largest attention logit of each head in the batch of the next step; set by the caller before each step where
        `config.qk_clip` is on, the same on every rank."""
        self.exchange: Exchange | None = None
        """Of the matrices; there once it is bound."""
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, but not by way of its compiler, which takes 1.5 s to import."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def bind(self, zero_optimizer: Any) -> None:
        """Learn the layout of DeepSpeed's wrapper (`engine.optimizer`) and create all state, before the first step.

        DeepSpeed links optimizer state once, after the first group's first step: state that is created later would be
        invisible to `safe_get_full_optimizer_state`.

        Raises:
            LayoutError: the wrapper's partition is not the one that `optim.layout` computes, or one of the module's
                parameters is in no group.
        """
        if getattr(zero_optimizer, "round_robin_gradients", False):
            raise LayoutError(
                "zero_optimization.round_robin_gradients=true: with it DeepSpeed's map of what lies where is wrong; "
                "turn it off"
            )
        ours = {parameter for parameters in self._parameters for parameter in parameters}
        if left := [name for p, name in zero_optimizer.param_names.items() if p.requires_grad and p not in ours]:
            raise LayoutError(f"{', '.join(left)}: in no group, so never trained; give the optimizer all parameters")
        for index, (group, parameters) in enumerate(zip(self.param_groups, self._parameters, strict=True)):
            process_group = zero_optimizer.real_dp_process_group[index]
            rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
            layout = GroupLayout.of(group["names"], [p.numel() for p in parameters], world_size)
            (shard,) = group["params"]
            _check_layout(layout, rank, parameters, shard)
            method = group["method"]
            self._layouts[method] = layout
            columns = {name: p.shape[-1] for name, p in zip(group["names"], parameters, strict=True)}
            self._slices[method] = slices_of(self._heads, layout.fragments(rank), columns)
            self.state[shard].update({key: torch.zeros_like(shard) for key in STATE_KEYS[method]})
            if method == "adamw":
                self._stretches = stretches(layout.fragments(rank), shard.numel(), self._adamw_step)
                self.state[shard]["step"] = torch.zeros((), dtype=torch.float32, device=shard.device)
            else:
                matrices = matrices_of(layout, group["matrices"], self._muon_step)
                plan = plan_orthogonalization(layout, matrices, self.config.operations)
                self.exchange = Exchange(plan, self.config, process_group, shard.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the shards of `param_groups`: all of them, or the one that DeepSpeed leaves visible."""
        found = factors(self.max_logits, self.config.qk_clip) if self.config.qk_clip else {}
        for group in self.param_groups:
            (shard,) = group["params"]
            if group["method"] == "muon":
                assert self.exchange is not None and shard.grad is not None
                momentum = self.state[shard]["momentum_buffer"]
                self.exchange.step(shard, shard.grad, momentum, group["lr"], group["weight_decay"])
            else:
                self._adamw(group, shard)
            clip(shard, self._slices[group["method"]], found)

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
            yield GroupLayout.of(layout.names, layout.numels, world_size), kinds_of(group["method"])

    def plan_figures(self, itemsize: int) -> PlanFigures | None:
        """Return how the matrices are shared out, None where there are none.

        Args:
            itemsize: bytes of a weight of the module.
        """
        if self.exchange is None:
            return None
        wire = self.exchange.wire_dtype.itemsize
        return self.exchange.plan.figures(self._layouts["muon"].partition, self.config.operations, itemsize, wire)

    @property
    def applied_steps(self) -> int:
        """Steps that AdamW's bias correction has counted; skipped steps are not among them."""
        return next((int(state["step"]) for state in self.state.values() if "step" in state), 0)

    @applied_steps.setter
    def applied_steps(self, steps: int) -> None:
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    def _muon_step(self, name: str, rows: int, columns: int) -> Step:
        return self.parametrization.step(name, "muon", rows, columns)

    def _adamw_step(self, name: str) -> Step:
        return self.parametrization.step(name, "adamw")

    def _adamw(self, group: dict[str, Any], shard: Tensor) -> None:
        config, state = self.config, self.state[shard]
        flat = (shard, shard.grad, state["exp_avg"], state["exp_avg_sq"])
        for step, intervals in self._stretches.items():
            weights, gradients, means, squares = ([of[a:b] for a, b in intervals] for of in flat)  # type: ignore
            adamw(
                weights,
                gradients,
                means,
                squares,
                [],
                list(state["step"].expand(len(intervals)).clone().unbind()),  # Each call counts its own.
                fused=True,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=group["lr"] * step.rate,
                weight_decay=group["weight_decay"] * (step.decay / step.rate),
                eps=config.eps,
                maximize=False,
            )
        state["step"].add_(1)


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
