"""A model is added as docs/models.md says: the page's example is GPT-2's architecture, small, and here it is tried.

It has what none of the built-in ones has: learned positions, LayerNorm with biases, one parameter for queries, keys
and values, other names, and an output layer that is the embedding.
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from jobs.hugging_face import refuse_unloadable
from jobs.load import documented_yaml, load_values
from jobs.planning.estimate import Machines
from jobs.planning.plan import plan_run
from optim.checks import ConfigProblems, require, within
from optim.config import OptimConfig
from optim.qk_clip import HeadRows
from tests.closeness import EPS, ROUNDINGS, assert_close
from tests.jobs.planning.test_plan import CPU
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from tests.workers.test_loop import task_of, trained
from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError
from workers.common.source import ROOT
from workers.config import MODELS, TelemetryConfig, model_config_of
from workers.generate import generate
from workers.models import build, build_empty, logits_of
from workers.models.attention import CausalAttention, take_logits, watch
from workers.models.cache import KeyValueCache, Mask
from workers.models.language_model import LanguageModel
from workers.models.layers import training_flops
from workers.models.masks import DocumentMask
from workers.reports import StepDone

pytestmark = pytest.mark.numeric

PLACE = "tests.workers.test_new_model.Gpt"


@dataclass(frozen=True, kw_only=True, slots=True)
class GptConfig:
    """A GPT-2, small by default."""

    name: Literal["gpt"] = "gpt"
    """Architecture."""
    vocab_size: int = 256
    """Tokens; 256 is the byte-level vocabulary."""
    width: int = 32
    """Of the residual stream; a multiple of num_heads."""
    num_layers: int = 2
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads."""
    positions: int = 256
    """The longest sequence."""
    init_std: float = 0.1
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        require(
            self,
            *within(self, "[1, inf)", "width", "num_layers", "num_heads", "positions"),
            *within(self, "[256, inf)", "vocab_size", lowest="bytes"),
            *within(self, "(0, 2]", "init_std"),
            (self.width % max(1, self.num_heads) == 0, f"width must be a multiple of num_heads, not {self.width}"),
        )

    def shallow(self) -> "GptConfig":
        return replace(self, num_layers=1, vocab_size=256)

    def training_keys(self) -> set[str]:
        return {"init_std"}


class Gpt(LanguageModel):
    """The model."""

    kinds: ClassVar = {
        "attention_qo": ("attention.out",),
        "attention_kv": ("attention.qkv",),
        "dense": ("mlp.",),
        "embedding": ("tokens", "positions"),
    }

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, documents: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        mask = cache if documents is None else DocumentMask(documents)
        places = torch.arange(tokens.size(1), device=tokens.device) if mask is None else mask.positions
        x = self.tokens(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    @property
    def head(self) -> Tensor:
        return self.tokens.weight

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def flops_per_token(self, seq_len: int) -> float:
        return training_flops(self, 1.0, self.config.num_layers * 2 * self.config.width, seq_len)

    def matrix_parts(self, split: str) -> dict[str, tuple[int, ...]]:
        width, heads = self.config.width, self.config.num_heads
        rows = {"none": (), "fused": (width,) * 3, "heads": (width // heads,) * (3 * heads)}[split]
        return {f"layers.{i}.attention.qkv.weight": rows for i in range(self.config.num_layers) if rows}

    def head_rows(self) -> list[HeadRows]:
        config, rows = self.config, []
        dim = config.width // config.num_heads
        for head in range(config.num_layers * config.num_heads):
            layer, place = divmod(head, config.num_heads)
            name = f"layers.{layer}.attention.qkv.weight"
            rows += [HeadRows(name, start + place * dim, dim, head, power=1 / 2) for start in (0, config.width)]
        return rows


class Layer(nn.Module):
    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        width = config.width
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Mask | None) -> Tensor:
        x = x + self.attention(self.before_attention(x), mask)
        return x + self.mlp(self.before_mlp(x))


class Attention(nn.Module):
    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width)
        self.attend = CausalAttention(config.num_heads)

    def forward(self, x: Tensor, mask: Mask | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


def test_the_page_names_every_member():
    page = (ROOT / "docs" / "models.md").read_text()
    named = {
        name for cell in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    members = {name for name in vars(LanguageModel) if not name.startswith("_")} - {"parameter_kinds"}
    assert named == members


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(MODELS, GptConfig, PLACE)


def test_yaml_names_it_and_the_plan_lays_it_out(registered):
    given = {"run": {"name": "mine"}, "data": {"source": "texts"}, "optim": {"split": "heads"}}
    config = load_values({**given, "model": {"name": "gpt", "width": 48}}, [], "mine")
    assert config.model == GptConfig(width=48) and "# Of the residual stream" in documented_yaml(config)
    with pytest.raises(ConfigError, match="model.name: must be one of moonlight, llama, llama-moe, gpt, not 'gtp'"):
        load_values({**given, "model": {"name": "gtp"}}, [], "mine")
    with pytest.raises(ConfigError, match="model.width must be a multiple of num_heads, not 50"):
        load_values({**given, "model": {"name": "gpt", "width": 50}}, [], "mine")
    assert model_config_of({"name": "gpt", "width": 48}) == config.model, "as a checkpoint has it"
    del MODELS[GptConfig]
    with pytest.raises(ConfigProblems, match="name must be one of moonlight, llama, llama-moe, not 'gpt'"):
        model_config_of({"name": "gpt", "width": 48})
    MODELS[GptConfig] = PLACE
    with pytest.raises(ConfigError, match="a gpt has no names in Hugging Face's terms"):
        refuse_unloadable(config.model)

    plan = plan_run(config, Machines(gpus=2, calibration=CPU))
    made = build_empty(config.model)
    assert plan.parameters == sum(p.numel() for p in made.parameters()) and plan.matrices.matrices == 2 * (12 + 1 + 2)


def test_muon_takes_its_matrices_and_nothing_else(registered):
    made = build_empty(GptConfig())
    assert made.tables() == {"tokens.weight", "positions.weight"}
    kinds = made.parameter_kinds()
    assert kinds["layers.1.mlp.0.weight"] == "dense" and kinds["layers.1.mlp.0.bias"] == "norms"
    assert set(kinds.values()) == {"attention_qo", "attention_kv", "dense", "embedding", "norms"}
    multiplied = 2 * 12 * 32 * 32 + 256 * 32  # The output layer's, though it is the embedding; positions are looked up.
    assert made.flops_per_token(8) == 3 * 2 * (multiplied + 2 * 2 * 32 * 8 / 2)
    made.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="more.weight is of no kind in Gpt.kinds"):
        made.parameter_kinds()


def test_its_attention_is_watched_and_its_heads_rows_scale_its_logits(registered):
    torch.manual_seed(0)
    made = build(GptConfig())
    tokens = torch.randint(256, (2, 24))
    watch(made, True)
    assert logits_of(made, tokens).shape == (2, 24, 256)
    before, parameters = take_logits(made).largest, dict(made.named_parameters())
    for rows in made.head_rows():
        if rows.head == 1:
            with torch.no_grad():
                parameters[rows.name][rows.first : rows.first + rows.count] *= 0.25**rows.power
    made(tokens)
    assert_close(take_logits(made).largest[:4], before[:4] * torch.tensor([1, 0.25, 1, 1]))


def test_it_writes_with_a_cache_what_it_writes_without(registered):
    torch.manual_seed(0)
    made, prompts = build(GptConfig()).double(), [[5], list(range(20)), [7, 3, 7]]
    assert generate(made, prompts, 30) == [generate(made, [one], 30, cache=False)[0] for one in prompts]


def trained_gpt(rank: int, world_size: int, task) -> dict:
    MODELS[task.model.__class__] = PLACE
    return trained(rank, world_size, task)


def went_on(rank: int, world_size: int, task) -> list[dict]:
    MODELS[task.model.__class__] = PLACE
    trainer, told = trainer_of(rank, world_size, task, restore=True)
    trainer.run()
    return told.of(StepDone)


def test_two_ranks_train_it_with_muon_and_one_goes_on_from_their_checkpoint(tmp_path):
    task = task_of(tmp_path, steps=6, sample_prompt="import", sample_bytes=3)
    optim = replace(task.optim, split="heads", qk_clip=50.0)
    task = replace(task, model=GptConfig(), optim=optim, telemetry=TelemetryConfig(every=2))
    assert isinstance(optim, OptimConfig) and optim.name == "muon"
    ranks = run_ranks(2, trained_gpt, task)
    assert {rank["outcome"] for rank in ranks} == {"finished"} and {rank["tokens"] for rank in ranks} == {6 * 6 * 32}
    losses = ranks[0]["losses"]
    assert losses[-1] < losses[0] and all(rank["saved"] == [2, 4, 6] for rank in ranks)
    for name, weight in ranks[0]["weights"].items():
        assert weight.equal(ranks[1]["weights"][name]), name

    shards = [next(one for one in rank["shards"] if one.step == 2) for rank in ranks]
    counters, shapes = shards[0].counters, shards[0].shapes
    files = tuple(one.shard for one in shards)
    manifest = Manifest("run", 1, 1, 2, 2, {}, counters, shapes, files)
    (rows,) = run_ranks(1, went_on, replace(task, manifest=manifest))
    assert [row["loss"] for row in rows] == pytest.approx(losses[2:], rel=100 * ROUNDINGS * EPS)
    measured = rows[1]["measured"]
    assert {"update_rms/attention_qo", "update_rms/embedding", "svd_entropy/dense"} <= measured.keys()
    assert not any(name.endswith(("/experts", "/router", "/head")) for name in measured)
