"""The gradient's noise against all micro-batches' gradients by plain torch, and against a variance that is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer import trainer_of
from tests.workers.test_llama import TINY as LLAMA
from tests.workers.test_loop import task_of
from workers.config import TelemetryConfig
from workers.data.config import DataConfig
from workers.data.prepare import prepare
from workers.gradient_noise import MicroBatchNorms, NoiseScale, Parts, parts_of
from workers.models import build
from workers.objective import summed_loss
from workers.reports import StepDone
from workers.task import Task

pytestmark = pytest.mark.numeric


def uneven(folder, **train) -> Task:
    """Return a task whose micro-batches have different numbers of targets that count: documents begin anywhere."""
    random = np.random.default_rng(0)
    sizes = [size for _ in range(30) for size in [[1] * 40, [90], [9] * 6][random.integers(3)]]
    lines = [{"text": "".join(random.choice(list("abc de\n"), size))} for size in sizes]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    data = DataConfig(source=f"{folder}/text.jsonl", prepared_url=f"{folder}/data", held_out_fraction=0.2)
    data = replace(data, document_mask=True)
    task = replace(task_of(folder, **train), data=data, corpora=prepare(data), model=LLAMA)
    return replace(task, telemetry=TelemetryConfig(every=1, spectra=0, peak_tflops=1.0))


def noise_of(rows: list[dict]) -> list[dict[str, float]]:
    found = [{k: v for k, v in row["measured"].items() if k.startswith("gradient_noise/")} for row in rows]
    return [{name.removeprefix("gradient_noise/"): value for name, value in one.items()} for one in found]


def trained(rank: int, world_size: int, task: Task, blind: bool = False) -> dict:
    """Train; return what was measured, the weights before each step and at the end, and the batches of each step."""
    if blind:
        MicroBatchNorms.start = lambda self: None  # type: ignore[method-assign]
    trainer, told = trainer_of(rank, world_size, task)
    weights, batches, seen = [], [], trainer.telemetry.begin

    def begin(step: int) -> None:
        weights.append({name: p.detach().clone() for name, p in trainer.engine.model.named_parameters()})
        batches.append([slot.batch for slot in trainer.upcoming if slot.counts])
        seen(step)

    trainer.telemetry.begin = begin  # type: ignore[method-assign]
    trainer.run()
    left = sum(len(p._backward_hooks or {}) for p in trainer.engine.model.parameters())
    begin(task.train.steps + 1)
    return {"rows": told.of(StepDone), "weights": weights, "batches": batches, "hooks": left}


def directly(task: Task, weights: dict, batches: list) -> tuple[Parts, list[int]]:
    """Return the definition's variance and squared norm, in fp64, and each micro-batch's number of targets."""
    model = build(task.model, initialize=False).double()
    model.load_state_dict(weights)
    counts, means = [], []
    for batch in batches:
        loss = summed_loss(model(*batch.given), model.head, batch.targets)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        counts.append(int((batch.targets >= 0).sum()))
        means.append(torch.cat([one.flatten() for one in gradient]) / counts[-1])
    tokens = sum(counts)
    mean = sum(count / tokens * one for count, one in zip(counts, means, strict=True))
    spread = sum(count * (one - mean).square().sum() for count, one in zip(counts, means, strict=True))
    variance = spread.item() / (len(means) - 1)
    return Parts(variance, mean.square().sum().item() - variance / tokens), counts


@pytest.mark.parametrize("gradients", ["whole", "partitioned"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_is_what_all_micro_batches_gradients_say(tmp_path, world_size, gradients):
    """Five micro-batches: over two and three ranks the shares are uneven. Clipping does not change what is measured."""
    task = uneven(tmp_path, steps=3, global_batch=10, gradients=gradients)
    assert task.optim.grad_clip > 0
    results = run_ranks(world_size, trained, task)
    scale = NoiseScale()
    for step, found in enumerate(noise_of(results[0]["rows"])):
        batches = [batch for result in results for batch in result["batches"][step]]
        expected, counts = directly(task, results[0]["weights"][step], batches)
        assert len(set(counts)) > 2 and len(counts) == 5, "even micro-batches would hide a wrong weight"
        assert found["variance"] == pytest.approx(expected.variance, rel=1e-4)
        assert found["squared_norm"] == pytest.approx(expected.squared_norm, rel=1e-3)
        assert found["scale"] == pytest.approx(scale.of(expected), rel=1e-3)
    assert all(result["hooks"] == 0 for result in results)


def test_more_ranks_than_micro_batches(tmp_path):
    """A rank without one runs another in which nothing counts, which tells of no noise."""
    task = uneven(tmp_path, steps=2, global_batch=4)
    alone, together = (noise_of(run_ranks(size, trained, task)[0]["rows"]) for size in (1, 3))
    for a, b in zip(alone, together, strict=True):
        assert a == pytest.approx(b, rel=1e-3) and a["variance"] > 0


def test_one_micro_batch_tells_nothing(tmp_path):
    result = run_ranks(1, trained, uneven(tmp_path, steps=2, global_batch=2))[0]
    assert noise_of(result["rows"]) == [{}, {}] and all(row["measured"] for row in result["rows"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_bitwise_what_it_would_be_without(tmp_path, precision):
    settings = {"steps": 3, "global_batch": 6, "precision": precision, "gradients": "whole"}
    task = uneven(tmp_path, **settings)
    seen, blind = (run_ranks(2, trained, task, blind)[0] for blind in (False, True))
    a, b = (noise_of(one["rows"])[0] for one in (seen, blind))
    assert a["variance"] > 0 > b["variance"], "the other has looked at no gradient"
    for a, b in zip(seen["weights"], blind["weights"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a, b) for a, b in zip(*(w.values() for w in seen["weights"][::3]), strict=True))


def test_in_bf16_it_is_the_same_but_for_its_rounding(tmp_path):
    whole, half = (
        noise_of(run_ranks(2, trained, uneven(tmp_path, steps=1, global_batch=12, precision=one))[0]["rows"])[0]
        for one in ("fp32", "bf16")
    )
    assert half["variance"] == pytest.approx(whole["variance"], rel=0.05)
    assert half["squared_norm"] == pytest.approx(whole["squared_norm"], rel=0.05)


def test_estimates_are_without_bias_where_the_truth_is_known():
    """Gradients of single tokens with covariance 9 I in 20 dimensions around a mean of norm 2, in uneven batches."""
    random, sizes = np.random.default_rng(1), np.array([1, 2, 3, 10, 40])
    tokens, mean = sizes.sum(), np.full(20, 2 / np.sqrt(20))
    found = []
    for _ in range(4000):
        means = mean + 3 * random.standard_normal((5, 20)) / np.sqrt(sizes)[:, None]
        whole = sizes @ means / tokens
        weighted = sizes @ np.square(means).sum(1) / tokens
        found.append(parts_of(weighted, 5, whole @ whole, int(tokens)))
    variances, norms = np.array([(one.variance, one.squared_norm) for one in found]).T
    for values, truth in ((variances, 9 * 20), (norms, 4.0)):
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)), (values.mean(), truth)
    assert norms.min() < 0, "an estimate that could not be negative would have a bias"


def test_the_scale_is_the_ratio_of_means_and_waits_until_there_is_a_gradient():
    scale = NoiseScale()
    assert scale.of(Parts(8.0, -1.0)) is None and scale.of(Parts(8.0, 0.5)) is None
    assert scale.of(Parts(8.0, 2.0)) == pytest.approx(8 * (0.81 + 0.9 + 1) / (-0.81 + 0.45 + 2.0))
    assert parts_of(1.0, 1, 1.0, 10) is None


def test_an_embedding_that_is_also_the_head_counts_once():
    """Its gradient comes from two places, and is measured when both are together."""
    shared = torch.nn.Linear(3, 3, bias=False)
    norms = MicroBatchNorms(shared, world_size=1)
    norms.start()
    x = torch.randn(4, 3)
    (shared(x) + shared(shared(x))).square().sum().backward()
    norms.add(2, 4)
    weighted, count = norms.stop().tolist()
    assert count == 1 and weighted == pytest.approx(2 * shared.weight.grad.square().sum().item())
