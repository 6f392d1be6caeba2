"""What needs a GPU: NCCL at world size 1, bf16, fused attention that is watched.

`make test-gpu` runs it; elsewhere it is marked as not run.
"""

from dataclasses import replace

import pytest
import torch

from optim import newton_schulz as newton_schulz_module
from optim.config import OptimConfig
from optim.newton_schulz import newton_schulz
from optim.spectra import entropy, singular_values
from tests.optim.test_zero1_oracle import CONFIG, SHAPES, assert_trained, reference, sharded
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from tests.workers.test_moonlight import TINY, tiny
from workers.config import CheckpointConfig, TelemetryConfig
from workers.data.config import DataConfig
from workers.data.prepare import prepare
from workers.models import attention as attention_module
from workers.models import logits_of
from workers.models.attention import CausalAttention, take_logits, watch
from workers.recipe import TrainConfig
from workers.reports import StepDone
from workers.task import Task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: there is no CUDA GPU here"),
]


@pytest.mark.parametrize("shapes", SHAPES)
def test_oracle_on_the_gpu(shapes):
    (result,) = run_ranks(1, sharded, SHAPES[shapes], True, CONFIG, device="cuda")
    expected = reference(1, SHAPES[shapes], True, CONFIG)
    for name, weight in result["weights"].items():
        assert_trained(weight, expected[name], name, SHAPES[shapes], CONFIG)


@pytest.mark.parametrize("shape", [(1408, 2048), (11264, 2048), (64, 2048), (1, 8)])
def test_singular_values_are_those_of_the_cpu(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    here, there = singular_values(matrix), singular_values(matrix.cuda()).cpu()
    assert there.dtype == torch.float64 and (there - here).abs().max() < 1e-7 * here[0]
    assert entropy(there.square()) == pytest.approx(entropy(here.square()), abs=1e-10)


@pytest.mark.parametrize("shape", [(20, 1408, 2048), (32, 2048, 1032), (2, 8192, 2048), (3, 1412, 2048)])
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_the_kernels_results_are_those_of_plain_products(monkeypatch, shape, form):
    """With the extra `gpu`; tall and wide, and a width that the kernel does not take."""
    if (kernel := newton_schulz_module._quack()) is None:
        pytest.skip("not run: the extra gpu is not installed")
    random = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=random, device="cuda")
    calls = []
    counted = lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(newton_schulz_module, "_quack", lambda: counted)
    result = newton_schulz(x, form=form, dtype=torch.bfloat16).float()
    monkeypatch.setattr(newton_schulz_module, "_quack", lambda: None)
    expected = newton_schulz(x, form=form, dtype=torch.bfloat16).float()
    exact = newton_schulz(x, form="standard", dtype=torch.float32)
    assert bool(calls) == (shape[1] % 8 == 0)
    assert (result - expected).norm() < 0.02 * expected.norm()
    assert (result - exact).norm() < 1.2 * (expected - exact).norm()


def test_experts_in_bf16_agree_with_fp32():
    model = tiny()
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = logits_of(model, tokens)
    result = logits_of(model.to("cuda", torch.bfloat16), tokens.cuda()).float().cpu()
    assert (result - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize(("key_heads", "dim", "value_dim"), [(4, 192, 128), (4, 64, 64), (1, 64, 64)])
def test_fused_attention_sees_what_the_plain_one_sees(key_heads, dim, value_dim):
    """Moonlight's widths, Llama's, and one key for all heads; in bf16, forward and backward."""
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 512, dim), (2, key_heads, 512, dim), (2, key_heads, 512, value_dim)]
    tensors = [
        (4 * torch.randn(shape, generator=random)).to("cuda", torch.bfloat16).requires_grad_() for shape in shapes
    ]
    attention = CausalAttention(4)
    expected = attention(*tensors)
    gradients = torch.autograd.grad(expected.float().square().sum(), tensors)
    watch(attention, True)
    out = attention(*tensors)
    assert (out - expected).float().norm() < 0.02 * expected.float().norm()
    for mine, theirs in zip(torch.autograd.grad(out.float().square().sum(), tensors), gradients, strict=True):
        assert (mine - theirs).float().norm() < 0.02 * theirs.float().norm()
    _, largest = attention_module._plain(*(tensor.float() for tensor in tensors))
    seen = take_logits(attention)
    assert seen.queries == 2 * 4 * 512
    assert torch.allclose(seen.largest, largest.amax((0, 2)), rtol=1e-2)
    assert abs(seen.large - (largest > attention_module.LARGE_LOGIT).sum()) < 0.02 * seen.queries


def test_qk_clip_and_telemetry_on_the_gpu(tmp_path):
    (result,) = run_ranks(1, train_bf16, str(tmp_path), 2.0, device="cuda")
    rows = result["measured"]
    print(rows[-1])
    logits = [row["attention/max_logit"] for row in rows]
    assert max(logits[10:]) < 3.0, "kept near the threshold of 2"
    assert 0 < rows[-1]["mfu"] < 1 and rows[-1]["seconds/optimizer"] > 0
    assert rows[-1]["update_rms/dense"] == pytest.approx(0.2, rel=0.3)


def train_bf16(rank: int, world_size: int, folder: str, qk_clip: float = 0.0) -> dict:
    train = TrainConfig(steps=30, global_batch=8, micro_batch=4, seq_len=128, precision="bf16", sample_prompt="")
    data = DataConfig(prepared_url=f"{folder}/data")
    task = Task(
        model=replace(TINY, v_head_dim=16),  # Narrower ones are no work for the fused kernel.
        optim=OptimConfig(lr=1e-2, ns_dtype="bf16", wire_dtype="bf16", qk_clip=qk_clip),
        telemetry=TelemetryConfig(every=1),
        data=data,
        train=train,
        checkpoint=CheckpointConfig(every=0),
        seed=0,
        corpora=prepare(data),
        run_url=f"{folder}/run",
        attempt=1,
        manifest=None,
    )
    trainer, told = trainer_of(rank, world_size, task)
    outcome, model, rows = trainer.run(), trainer.engine.model, told.of(StepDone)
    return {
        "outcome": outcome,
        "losses": [row["loss"] for row in rows],
        "measured": [row["measured"] for row in rows],
        "weights": str({p.dtype for p in model.parameters()}),
        "biases": str({b.dtype for name, b in model.named_buffers() if name.endswith("correction_bias")}),
    }


def test_bf16_training_learns(tmp_path):
    (result,) = run_ranks(1, train_bf16, str(tmp_path), device="cuda")
    assert result["outcome"] == "finished" and result["losses"][-1] < result["losses"][0] - 1
    assert result["weights"] == "{torch.bfloat16}" and result["biases"] == "{torch.float32}"
