"""Settings of what runs in a worker: model, telemetry, checkpoints and storage; of the training, see `recipe`."""

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

from optim.checks import Check, ConfigProblems, filled, no_password, require, within

EXPERT_WIDTH = 8
"""Divides the widths of experts: torch's grouped_mm refuses rows that are not whole 16 bytes, 8 numbers in bf16. In
fp32 4 would do, but a model that trains on a CPU trains on a GPU, too."""


class ModelConfig(Protocol):
    """What the settings of every architecture have: a frozen dataclass, small by default, that checks itself."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def name(self) -> str:
        """The architecture's, in YAML as in checkpoints."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers, each of which can be computed again in the backward pass."""
        ...

    @property
    def init_std(self) -> float:
        """Standard deviation of the initial weights."""
        ...

    def shallow(self) -> "ModelConfig":
        """Return the smallest model whose attention is this one's: one layer of each kind, 256 tokens."""
        ...

    def training_keys(self) -> set[str]:
        """Return the keys that say how it is trained and not what it is: a run from its weights may have others."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MoonlightConfig:
    """A Moonlight: DeepSeek-V3's architecture (multi-head latent attention, mixture of experts).

    The default sizes are small, one million parameters, so that they train anywhere; all else is as in
    Moonlight-16B-A3B, whose sizes are in the built-in config `moonlight-16b`.
    """

    name: Literal["moonlight"] = "moonlight"
    """Architecture."""
    vocab_size: int = 256
    """Tokens; 256 is the byte-level vocabulary."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 3
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    kv_lora_rank: int = 64
    """Width of the compressed keys and values."""
    qk_nope_head_dim: int = 16
    """Width per head of the query and key without positions."""
    qk_rope_head_dim: int = 16
    """Width per head of the query and key with rotary positions; even."""
    v_head_dim: int = 32
    """Width per head of the values."""
    rope_theta: float = 50000.0
    """Base of the rotary positions."""
    intermediate_size: int = 352
    """Width of the dense layers' SwiGLU."""
    num_dense_layers: int = 1
    """The first layers have a dense SwiGLU instead of experts."""
    moe_intermediate_size: int = 96
    """Width of one expert's SwiGLU; where there are experts it and hidden_size are multiples of 8."""
    num_experts: int = 8
    """Routed experts per layer."""
    num_experts_per_token: int = 2
    """Routed experts that a token visits. With 1 the renormalized gate is always 1, and the router does not learn."""
    num_shared_experts: int = 1
    """Experts' worth of SwiGLU that every token visits."""
    routed_scaling_factor: float = 2.446
    """Scale of the renormalized gates."""
    router_bias_rate: float = 1e-3
    """Step of the balancing bias after each training step; 0 freezes it."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm; in the latent's, DeepSeek's 1e-6 is, whatever stands here."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        sizes = (
            *("hidden_size", "num_layers", "num_heads", "kv_lora_rank", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size", "num_experts"),
            *("num_experts_per_token",),
        )
        require(
            self,
            *within(self, "[1, inf)", *sizes),
            *within(self, "[256, inf)", "vocab_size", lowest="bytes"),
            (self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim must be even, not {self.qk_rope_head_dim}"),
            (
                0 <= self.num_dense_layers <= self.num_layers,
                f"num_dense_layers must be between 0 and num_layers ({self.num_layers}), not {self.num_dense_layers}",
            ),
            (
                self.num_experts_per_token <= self.num_experts,
                f"num_experts_per_token must be at most num_experts ({self.num_experts}), "
                f"not {self.num_experts_per_token}",
            ),
            *(
                (
                    self.num_dense_layers >= self.num_layers or getattr(self, key) % EXPERT_WIDTH == 0,
                    f"{key} must be a multiple of {EXPERT_WIDTH} where there are experts, whose grouped products need "
                    f"rows of whole 16 bytes, not {getattr(self, key)}",
                )
                for key in ("hidden_size", "moe_intermediate_size")
            ),
            *within(self, "[0, inf)", "num_shared_experts"),
            *within(self, "[0, 1]", "router_bias_rate"),
            *within(self, "[1e-6, 1000]", "routed_scaling_factor"),
            *_sane(self),
        )

    def shallow(self) -> "MoonlightConfig":
        """Return it with one layer, a dense one."""
        return replace(self, num_layers=1, num_dense_layers=1, vocab_size=256)

    def training_keys(self) -> set[str]:
        """Return what the initial weights and the balance of experts come from."""
        return {"init_std", "router_bias_rate"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """A Llama: a dense transformer with grouped-query attention.

    The default sizes are small, one million parameters, so that they train anywhere; the output layer is its own.
    """

    name: Literal["llama"] = "llama"
    """Architecture."""
    vocab_size: int = 256
    """Tokens; 256 is the byte-level vocabulary."""
    hidden_size: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 2
    """Key and value heads; divides num_heads."""
    head_dim: int = 16
    """Width per head; even."""
    rope_theta: float = 500000.0
    """Base of the rotary positions."""
    intermediate_size: int = 480
    """Width of the SwiGLU."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        require(
            self,
            *within(self, "[1, inf)", *sizes),
            *within(self, "[256, inf)", "vocab_size", lowest="bytes"),
            (self.head_dim % 2 == 0, f"head_dim must be even, not {self.head_dim}"),
            (
                self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads == 0,
                f"num_heads must be a multiple of num_kv_heads ({self.num_kv_heads}), not {self.num_heads}",
            ),
            *_sane(self),
        )

    def shallow(self) -> "LlamaConfig":
        """Return it with one layer."""
        return replace(self, num_layers=1, vocab_size=256)

    def training_keys(self) -> set[str]:
        """Return what the initial weights come from."""
        return {"init_std"}


def _sane(model: ModelConfig) -> Iterator[Check]:
    """Yield the checks of numbers that a model trains with, whatever they are, and of which it makes nonsense."""
    yield from within(model, "[1e-20, 1]", "norm_eps")
    yield from within(model, "[1e-4, 2]", "init_std")
    yield from within(model, "(1, 1e15]", "rope_theta")


MODELS: dict[type[ModelConfig], str] = {
    MoonlightConfig: "workers.models.moonlight.Moonlight",
    LlamaConfig: "workers.models.llama.Llama",
}
"""The architectures: the class of each one's settings, and where its model is; docs/models.md says how to add one. The
model is imported where it is built: the driver, which reads the settings, has no torch."""


def model_config_of(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the settings of a model that were put down as plain values.

    Raises:
        ConfigProblems: there is no such model, or they are no longer allowed.
    """
    for kind in MODELS:
        if fields["name"] == (known := kind()).name:
            return replace(known, **fields)
    raise ConfigProblems([f"name must be one of {', '.join(kind().name for kind in MODELS)}, not {fields['name']!r}"])


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """What is measured of the training itself, and how often."""

    every: int = 100
    """Steps between measurements: MFU, time per part, RMS of updates and weights, attention logits, spectra, load of
    experts; 0 for none."""
    spectra: int = 4
    """Experts of a layer whose spectra are measured, beside those of all other matrices; 0 measures none at all."""
    peak_tflops: float = 0.0
    """Peak of a worker's device, for MFU, in 10^12 operations per second; 0: as published for its GPU, or measured."""
    profile_step: int = 0
    """First step that the profiler traces on rank 0; 0 for none. The trace becomes an artifact of the run."""
    profile_steps: int = 1
    """Steps that it traces."""

    def __post_init__(self) -> None:
        require(
            self,
            *within(self, "[0, inf)", "every", lowest="never"),
            *within(self, "[0, inf)", "spectra", "profile_step", lowest="none"),
            *within(self, "[0, inf)", "peak_tflops", lowest="automatic"),
            *within(self, "[1, inf)", "profile_steps"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where checkpoints go, and when."""

    url: str = "runs/checkpoints"
    """Folder (fsspec URL, for instance s3://bucket/prefix) under which each run has its own."""
    every: int = 100
    """Steps between checkpoints; the last step always makes one. 0: the last only."""
    at: tuple[int, ...] = ()
    """Steps that make one, too, which is always kept: other runs may branch off there (train.init_state=run)."""
    snapshot_every: int = 0
    """Steps between snapshots into the keepers' memory, from which a fault is recovered. 0: as often as
    snapshot_share allows, every step where it can be."""
    snapshot_share: float = 0.03
    """The share of the time that snapshots may take where snapshot_every is 0."""
    keep_last: int = 5
    """Newest checkpoints that are kept. 0: all of them."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept, too. 0: none for that."""
    keep_best: int = 0
    """Best checkpoints that are kept, too, by keep_best_by."""
    keep_best_by: Literal["val_loss", "loss"] = "val_loss"
    """What makes a checkpoint better, where it is lower; val_loss where a validation was made at its step."""
    grace_s: float = 3600.0
    """Files of dead attempts are left alone for this long."""

    def __post_init__(self) -> None:
        require(
            self,
            *filled(self, url="a folder"),
            *no_password(self, "url"),
            *within(self, "[0, inf)", "every", lowest="the last step only"),
            (all(step >= 1 for step in self.at), f"at must be steps, 1 or more, not {list(self.at)}"),
            *within(self, "[0, inf)", "snapshot_every", lowest="automatic"),
            *within(self, "(0, 1)", "snapshot_share"),
            *within(self, "[0, inf)", "keep_last", "keep_every", "keep_best", "grace_s"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """How storage is reached. Credentials come from the environment or a role, never from a config."""

    s3_endpoint: str = ""
    """Endpoint URL of an S3 store that is not AWS; empty for AWS, or for what the environment says."""
    max_upload_mb_per_s: float = 0.0
    """Megabytes per second that a node writes to storage at most; 0: no limit."""

    def __post_init__(self) -> None:
        require(
            self,
            *within(self, "[0, inf)", "max_upload_mb_per_s", lowest="no limit"),
            (
                not self.s3_endpoint or self.s3_endpoint.startswith(("http://", "https://")),
                f"s3_endpoint must start with http:// or https://, not {self.s3_endpoint!r}",
            ),
            *no_password(self, "s3_endpoint"),
        )
