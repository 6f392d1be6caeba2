"""What needs a GPU: NCCL at world size 1 and bf16. `make test-gpu` runs it; elsewhere it is marked as not run."""

import pytest
import torch

from optim.config import OptimConfig
from tests.optim.test_zero1_oracle import CONFIG, SHAPES, reference, sharded
from tests.ranks import run_ranks
from tests.workers.test_moonlight import TINY, tiny
from workers.config import CheckpointConfig, DataConfig, TrainConfig
from workers.data.corpus import prepare
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
        assert (weight.cpu() - expected[name]).abs().max() < 1e-5, name


def test_experts_in_bf16_agree_with_fp32():
    model = tiny()
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = model(tokens)
    result = model.to("cuda", torch.bfloat16)(tokens.cuda()).float().cpu()
    assert (result - expected).abs().mean() < 0.05 * expected.abs().mean()


def train_bf16(rank: int, world_size: int, folder: str) -> dict:
    from workers.controls import Controls
    from workers.engine import build_engine, default_device
    from workers.loop import Trainer
    from workers.reports import StepDone
    from workers.state import Counters
    from workers.task import Membership

    train = TrainConfig(steps=30, global_batch=8, micro_batch=4, seq_len=128, precision="bf16", sample_prompt="")
    data = DataConfig(prepared_url=f"{folder}/data")
    task = Task(
        model=TINY,
        optim=OptimConfig(lr=1e-2, ns_dtype="bf16", wire_dtype="bf16"),
        data=data,
        train=train,
        checkpoint=CheckpointConfig(every=0),
        seed=0,
        corpus=prepare(data),
        run_url=f"{folder}/run",
        attempt=1,
        manifest=None,
    )
    losses: list[float] = []
    engine = build_engine(task.model, task.optim, train, 0, default_device())
    report = lambda kind, **fields: losses.append(fields["loss"]) if kind is StepDone else None  # noqa: E731
    member = Membership(generation=1, rank=rank, world_size=world_size, host="", port=0, keepers=False)
    outcome = Trainer(task, member, engine, Counters(), Controls(report=report)).run()
    kinds = {p.dtype for p in engine.model.parameters()}
    biases = {b.dtype for n, b in engine.model.named_buffers() if n.endswith("correction_bias")}
    return {"outcome": outcome, "losses": losses, "weights": str(kinds), "biases": str(biases)}


def test_bf16_training_learns(tmp_path):
    (result,) = run_ranks(1, train_bf16, str(tmp_path), device="cuda")
    assert result["outcome"] == "finished" and result["losses"][-1] < result["losses"][0] - 1
    assert result["weights"] == "{torch.bfloat16}" and result["biases"] == "{torch.float32}"
