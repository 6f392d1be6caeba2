"""Attention that is watched, and what QK-Clip makes of what it sees."""

from dataclasses import replace
from statistics import median

import pytest
import torch

from optim.config import OptimConfig
from tests.closeness import assert_close
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from tests.workers.test_llama import TINY as LLAMA
from tests.workers.test_loop import task_of
from tests.workers.test_moonlight import TINY as MOONLIGHT
from workers.config import ModelConfig, TelemetryConfig
from workers.models import build
from workers.models.attention import CausalAttention, take_logits, watch
from workers.reports import StepDone

pytestmark = pytest.mark.numeric

ONE_KEY_PER_HEAD = replace(LLAMA, num_kv_heads=LLAMA.num_heads)
MODELS = {"moonlight": MOONLIGHT, "llama": LLAMA, "llama without groups": ONE_KEY_PER_HEAD}


def inputs(key_heads: int) -> list[torch.Tensor]:
    """Logits of some tens, with some above 100."""
    random = torch.Generator().manual_seed(0)
    shapes = [((2, 4, 9, 8), 7.0), ((2, key_heads, 9, 8), 7.0), ((2, key_heads, 9, 6), 1.0)]
    return [(size * torch.randn(shape, generator=random)).requires_grad_() for shape, size in shapes]


def defined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what attention is, and the logits `[batch, heads, time, time]`."""
    k, v = (shared.repeat_interleave(4 // shared.size(1), 1) for shared in (k, v))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_watching_changes_nothing_and_sees_every_query(key_heads):
    attention = CausalAttention(4)
    tensors = inputs(key_heads)
    exactly = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected, scores = defined(*exactly)
    largest = scores.amax(-1)
    gradients = torch.autograd.grad(expected.square().sum(), exactly)
    # A softmax makes of a logit's rounding, which goes with the logit, a weight's.
    enlarged = largest.square().mean().sqrt().item()
    for watched in (False, True):
        watch(attention, watched)
        out = attention(*tensors)
        assert_close(out, expected, enlarged)
        for mine, theirs in zip(torch.autograd.grad(out.square().sum(), tensors), gradients, strict=True):
            assert_close(mine, theirs, enlarged)

    seen = take_logits(attention)
    assert_close(seen.largest, largest.amax((0, 2)))
    assert seen.large == (largest > 100).sum() and 0 < seen.large < seen.queries == 2 * 4 * 9
    assert take_logits(attention).largest.eq(-torch.inf).all(), "it is forgotten"
    attention.eval()
    attention(*tensors)
    assert take_logits(attention).queries == 0, "validation is not watched"


@pytest.mark.parametrize("model", MODELS)
def test_each_heads_rows_scale_its_logits_and_no_others(model):
    torch.manual_seed(0)
    made = build(MODELS[model])
    tokens = torch.randint(256, (2, 24))
    watch(made, True)
    made(tokens)
    before = take_logits(made).largest
    parameters, clipped = dict(made.named_parameters()), {1: 0.25, 2: 0.5}
    for rows in made.head_rows():
        if rows.head in clipped:  # Heads of the first layer: what later layers see changes.
            with torch.no_grad():
                parameters[rows.name][rows.first : rows.first + rows.count] *= clipped[rows.head] ** rows.power
    made(tokens)
    after = take_logits(made).largest
    expected = before.clone()
    for head, factor in clipped.items():
        expected[head] *= factor
    heads = MODELS[model].num_heads
    assert_close(after[:heads], expected[:heads])


def peaks(rank: int, world_size: int, folder: str, model: ModelConfig, qk_clip: float) -> list[float]:
    """Train with nothing that holds the weights back, and return each step's largest logit."""
    schedule: dict = {"schedule": "wsd", "decay_fraction": 0.5, "final_lr_fraction": 0.01}
    optim = OptimConfig(lr=0.2, weight_decay=0.0, qk_clip=qk_clip, **schedule)
    task = replace(task_of(folder, steps=60, global_batch=48, micro_batch=12), model=model, optim=optim, seed=0)
    trainer, told = trainer_of(rank, world_size, replace(task, telemetry=TelemetryConfig(every=1, spectra=0)))
    assert trainer.run() == "finished"
    return [row["measured"]["attention/max_logit"] for row in told.of(StepDone)]


@pytest.mark.parametrize("model", ["moonlight", "llama"])
def test_logits_that_blow_up_are_kept_at_the_threshold(tmp_path, model):
    """A step, and another batch, add to what was clipped after the last: the less, the smaller the learning rate."""
    free = run_ranks(2, peaks, str(tmp_path), MODELS[model], 0.0)[0]
    kept = run_ranks(2, peaks, str(tmp_path), MODELS[model], 100.0)[0]
    print(
        f"{model}, largest logit every ten steps: {[round(x) for x in free[9::10]]}, {[round(x) for x in kept[9::10]]}"
    )
    first = next(step for step, logit in enumerate(free) if logit > 100)
    assert kept[: first + 1] == free[: first + 1], "nothing is clipped before"
    assert free[-1] > 300, "without it they grow on"
    assert max(kept) < free[-1] / 2 and 90 < median(kept[-10:]) < 130, (
        "with it they stay, but for a step here and there"
    )
