"""What every model can: the whole of what the rest of raymuon asks of one.

It is a class and no `typing.Protocol`: a model is a module of torch's as well, and most models have no experts, no
fused projections and nothing to clip, which is said here once.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from optim.config import MOST_DECAY, OptimConfig
from optim.mup import STANDARD, Parametrization, Role
from optim.qk_clip import HeadRows
from workers.common.errors import ConfigError
from workers.models.cache import KeyValueCache

MATRICES = ("attention_qo", "attention_kv", "experts", "shared_experts", "router", "dense")
KINDS = (*MATRICES, "embedding", "head", "norms")
"""The groups of parameters that telemetry measures; the names of its metrics (Moonlight, section 3.4)."""


class LanguageModel(nn.Module, ABC):
    """A causal language model.

    Its attention goes through `CausalAttention`, which tells how large the logits are. Parameters have two dimensions
    or fewer, or three where `[E, out, in]` are E matrices of their own. Every operation is deterministic.
    """

    kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention_qo": ("self_attn.q_proj", "self_attn.o_proj"),
        "attention_kv": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.kv_a_proj", "self_attn.kv_b_proj"),
        "experts": ("mlp.experts",),
        "shared_experts": ("mlp.shared_experts",),
        "router": ("mlp.gate.",),
        "dense": ("mlp.",),
        "embedding": ("embed_tokens",),
        "head": ("lm_head",),
    }
    """What is part of the names of the matrices of each of KINDS, the first that fits: Hugging Face's, unless a model
    has others. Vectors are `norms`, whatever they are called."""

    narrowing: ClassVar[tuple[str, ...]] = ("mlp.gate.", "self_attn.kv_a_proj")
    """What is part of the names of matrices whose rows stay as many at any width: routers, the way to latents."""
    widening: ClassVar[tuple[str, ...]] = ("self_attn.kv_b_proj",)
    """And of those whose columns do: the way from latents."""

    @abstractmethod
    def forward(self, tokens: Tensor, documents: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Map tokens, int64 `[batch, time]`, to hidden states `[batch, time, hidden]` in the dtype of the weights.

        They are what the head takes, after the last norm; a position sees itself and those before it.

        Args:
            tokens: of the sequences.
            documents: the document of each position, int32 `[batch, time]`: a position then sees its own alone, in
                which positions start anew; NOBODY (`workers/common/documents.py`) where a sequence is filled up, which
                is not counted in what the model tells of itself. None: each sequence is one.
            cache: in the place of documents: of what comes before these tokens, told how many come (`expect`).
        """

    @property
    @abstractmethod
    def head(self) -> Tensor:
        """The output layer's weight, `[vocabulary, hidden]`; the embedding's, where they are one."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer layers in their order, all called alike: what is recomputed or compiled, one by one."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations of training on a token; `training_flops` says what is counted."""

    def initialize(self, std: float, parametrization: Parametrization = STANDARD) -> None:
        """Draw the initial weights from torch's random state: matrices and tables here, the rest as it was made."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:  # Norm gains start at one.
                nn.init.normal_(parameter, std=std * parametrization.std(name, *parameter.shape[-2:]))

    def roles(self) -> dict[str, Role]:
        """Return what each parameter is to a rule of widths, by name."""
        embeddings = self.embeddings()

        def role(name: str, parameter: Tensor) -> Role:
            if parameter is self.head:
                return "head"
            if name in embeddings:
                return "embedding"
            if parameter.dim() < 2:
                return "vector"
            if any(part in name for part in self.narrowing):
                return "narrowing"
            return "widening" if any(part in name for part in self.widening) else "hidden"

        return {name: role(name, parameter) for name, parameter in self.named_parameters()}

    def parametrization(self, config: OptimConfig) -> Parametrization:
        """Return how the optimizer's rule of widths scales this model.

        Raises:
            ConfigError: it cannot: the output layer is the embedding, or a step would take too much of the weights.
        """
        rule, width = config.width_rule, self.head.shape[1]
        if rule == "none":
            return STANDARD
        roles, parts = self.roles(), self.matrix_parts(config.split)
        if tied := sorted(name for name in self.embeddings() if roles[name] == "head"):
            raise ConfigError(
                f"optim.width_rule={rule}: {tied[0]} is the embedding and the output layer, which a rule scales "
                "differently; use a model with an output layer of its own, or optim.width_rule=none"
            )
        found = Parametrization(rule, width / config.base_width, roles, frozenset(parts))
        if (taken := config.lr * config.weight_decay * found.largest_decay()) > MOST_DECAY * (1 + 1e-9):
            raise ConfigError(
                f"optim.base_width={config.base_width}: at width {width} a step would take {taken:.2g} of the weights, "
                f"and {MOST_DECAY:g} is the most; lower optim.weight_decay={config.weight_decay:g}, or take a smaller "
                "base width"
            )
        return found

    def tables(self) -> set[str]:
        """Return the names of weights that are tables of vectors and not maps between hidden spaces: AdamW's.

        All other parameters of two dimensions or more are Muon's. Here: those of embeddings, and the head's.
        """
        return self.embeddings() | {name for name, parameter in self.named_parameters() if parameter is self.head}

    def embeddings(self) -> set[str]:
        """Return the names of weights out of which rows are taken, with which nothing is multiplied."""
        modules = self.named_modules()
        return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding)}

    def matrix_parts(self, split: str) -> dict[str, tuple[int, ...]]:
        """Return rows of each matrix of its own within a parameter, by name, as `optim.split` says.

        Parameters that are not named are one matrix, or a stack of them.
        """
        return {}

    def head_rows(self) -> list[HeadRows]:
        """Return what QK-Clip may scale, heads counted through all layers in the order of their modules."""
        return []

    def parameter_kinds(self) -> dict[str, str]:
        """Return the one of KINDS to which each parameter belongs.

        Raises:
            ValueError: a matrix is of none.
        """
        found = {}
        for name, parameter in self.named_parameters():
            fitting = (kind for kind, parts in self.kinds.items() if any(part in name for part in parts))
            found[name] = next(fitting, None) if parameter.dim() >= 2 else "norms"
            if found[name] not in KINDS:
                raise ValueError(f"{name} is of no kind in {type(self).__name__}.kinds; each matrix has one of KINDS")
        return found

    def expert_load(self) -> Tensor:
        """Return how many tokens each expert got since the last `clear_expert_load`: int64 `[MoE layers, experts]`."""
        return torch.zeros(0, 0, dtype=torch.int64)

    def clear_expert_load(self) -> None:
        """Start counting anew."""

    def balance_experts(self, load: Tensor, rate: float | None = None) -> None:
        """Act on the load of the global batch, `[MoE layers, experts]`, summed over all ranks; once after each step.

        At a stage's own rate, where it has one.
        """
