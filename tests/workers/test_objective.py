"""What counts is what a person says counts: targets left out change nothing, on any rank, and are in no divisor."""

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import EPS, ROUNDINGS, assert_close
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from tests.workers.test_llama import TINY
from tests.workers.test_loop import task_of
from workers.common.errors import TrainingError
from workers.models import build
from workers.models.cross_entropy import ROWS
from workers.objective import IGNORED, batch_of, summed_loss

pytestmark = pytest.mark.numeric


def test_each_token_predicts_the_next_and_the_mask_is_of_targets():
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert batch_of(tokens).targets.tolist() == [[6, 7, 8]] and batch_of(tokens).counted == 3
    some = batch_of(tokens, torch.tensor([[True, False, True, False]]))
    assert some.inputs.tolist() == [[5, 6, 7]] and some.targets.tolist() == [[IGNORED, 7, IGNORED]]
    assert some.counted == 1 and some.without_targets().counted == 0


def test_the_loss_is_that_of_the_targets_that_count_alone():
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 5, 8, generator=random), torch.randn(11, 8, generator=random, requires_grad=True)
    batch = batch_of(torch.randint(11, (2, 6), generator=random), torch.rand(2, 6, generator=random) < 0.5)
    log = F.log_softmax(hidden.double() @ head.double().T, -1)
    exact = -sum(log[b, t, token] for b, row in enumerate(batch.targets) for t, token in enumerate(row) if token >= 0)
    assert_close(summed_loss(hidden, head, batch.targets), exact)
    nothing = summed_loss(hidden, head, batch.without_targets().targets)
    nothing.backward()
    assert nothing == 0 and not head.grad.any()


@pytest.mark.parametrize("tokens", [1, 6, 7, 20])
@pytest.mark.parametrize("counted", [0.0, 0.5, 1.0])
def test_the_loss_of_some_tokens_after_the_others_is_that_of_all(tokens, counted, monkeypatch):
    monkeypatch.setitem(ROWS, "cpu", 3)
    random = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(1, tokens, 8, generator=random), torch.randn(300, 8, generator=random)
    batch = batch_of(torch.randint(300, (1, tokens + 1), generator=random))
    targets = batch.targets.masked_fill(torch.rand(1, tokens, generator=random) >= counted, IGNORED)

    def learned(dtype: torch.dtype, chunked: bool) -> list[torch.Tensor]:
        leaves = [one.to(dtype).requires_grad_() for one in (hidden, head)]
        loss = (
            summed_loss(*leaves, targets, chunked)
            if dtype != torch.float64
            else F.cross_entropy(
                F.linear(*leaves).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        )
        return [loss.detach(), *torch.autograd.grad(loss * 0.037, leaves)]

    found, exact = learned(torch.float32, True), learned(torch.float64, False)
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other, enlarged=2.0)
    assert all(torch.equal(one, other) for one, other in zip(found, learned(torch.float32, True), strict=True))
    with torch.no_grad():
        assert_close(summed_loss(hidden, head, targets, chunked=True), exact[0])


def test_a_loss_in_bf16_keeps_all_digits_and_its_gradient_the_factor():
    """Torch's own returns it in bf16, three digits, and multiplies the gradient by a factor of three digits."""
    hidden, head = torch.randn(1, 64, 16).bfloat16(), torch.randn(300, 16).bfloat16().requires_grad_()
    targets, factor = torch.randint(300, (1, 64)), 1 / 12345.0
    exact = F.cross_entropy(F.linear(hidden[0].double(), head.double()), targets[0], reduction="sum")
    loss = summed_loss(hidden, head, targets, chunked=True)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=2e-3)
    (loss * factor).backward()
    (of_head,) = torch.autograd.grad(exact * factor, head)
    along = (head.grad.double() * of_head.double()).sum() / of_head.double().square().sum()
    assert along.item() == pytest.approx(1.0, abs=5e-4), "bf16's own rounding goes either way"


def counts(samples: list[int], length: int, empty: set[int]) -> torch.Tensor:
    """Return which tokens of some samples count: none of those in `empty`, about a third of each other's."""
    masks = [
        torch.rand(length, generator=torch.Generator().manual_seed(sample)) < (sample not in empty) / 3
        for sample in samples
    ]
    return torch.stack(masks)


def masked(rank: int, world_size: int, task, empty: set[int], steps: int) -> dict:
    """Train with a mask; return the gradients that the optimizer gets in the first step, by name and place."""
    from workers.feed import Feed
    from workers.reports import StepDone, Validated

    def batch(self, part, drawn):
        tokens = torch.from_numpy(part.tokens[0].batch(drawn.sample))
        return batch_of(tokens, counts(drawn.sample.tolist(), tokens.size(1), empty))

    Feed.batch = batch
    trainer, told = trainer_of(rank, world_size, task)
    optimizer = trainer.engine.optimizer
    pieces: list[tuple[str, int, torch.Tensor]] = []

    def keep(*_) -> None:
        if trainer.counters.step == 0:
            for group in optimizer.param_groups:  # DeepSpeed shows one at a time.
                (shard,) = group["params"]
                for f in optimizer._layouts[group["method"]].fragments(rank):
                    pieces.append((f.name, f.start, shard.grad[f.offset : f.offset + f.length].clone()))

    optimizer.register_step_pre_hook(keep)
    trainer._validate()
    try:
        for _ in range(steps):
            trainer._step()
        error = ""
    except TrainingError as raised:
        error = str(raised)
    return {
        "pieces": pieces,
        "error": error,
        "tokens": trainer.counters.tokens,
        "steps": [(fields["loss"], fields["step_tokens"]) for fields in told.of(StepDone)],
        "val_loss": [fields["loss"] for fields in told.of(Validated)],
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_masked_step_is_that_of_one_process_in_fp64_whoever_computes_it(tmp_path, world_size):
    """Three slots, and nothing counts in the second. Two ranks have one and two; of four one has none, and one that."""
    from dataclasses import replace

    from workers.data.tokens import TokenSplit
    from workers.feed import indices_of_slot, order_of

    task = task_of(tmp_path)
    task = replace(task, model=TINY, optim=replace(task.optim, grad_clip=0.0))
    train, corpus = task.train, task.corpora[0]
    split = TokenSplit(corpus, corpus.train, train.seq_len)

    order = order_of(task.data, task.recipe, train.seq_len, task.seed, task.corpora)

    def samples(step: int, slot: int) -> list[int]:
        return order.at(indices_of_slot(task.recipe, step, train.micro_batch, slot)).sample.tolist()

    second = {sample for slot in range(3) for sample in samples(2, slot)}
    empty = {*samples(1, 1), *second}
    assert not second & {*samples(1, 0), *samples(1, 2)}

    torch.manual_seed(task.seed)
    model = build(TINY).double()

    def mean(split, samples) -> tuple[torch.Tensor, int]:
        """Return the loss, target by target."""
        tokens = torch.from_numpy(split.batch(samples))
        which = counts(samples, tokens.size(1), empty)[:, 1:]
        log = F.log_softmax(model(tokens[:, :-1]) @ model.head.T, -1)
        losses = -log.gather(-1, tokens[:, 1:, None])[..., 0]
        return losses[which].mean(), int(which.sum())

    loss, counted = mean(split, [sample for slot in range(3) for sample in samples(1, slot)])
    loss.backward()
    held_out = TokenSplit(corpus, corpus.validation, train.seq_len)
    spread = [i * held_out.num_samples // train.validate_sequences for i in range(train.validate_sequences)]
    val_loss, _ = mean(held_out, spread)

    ranks = run_ranks(world_size, masked, task, empty, 2)
    assert 0 < counted < train.global_batch * train.seq_len / 2
    ((found, step_tokens),) = ranks[0]["steps"]
    assert step_tokens == counted and {rank["tokens"] for rank in ranks} == {counted}
    assert found == pytest.approx(loss.item(), rel=ROUNDINGS * EPS)
    assert ranks[0]["val_loss"] == [pytest.approx(val_loss.item(), rel=ROUNDINGS * EPS)]
    gradients = {name: torch.full((p.numel(),), torch.nan) for name, p in model.named_parameters()}
    for name, start, values in (piece for rank in ranks for piece in rank["pieces"]):
        gradients[name][start : start + len(values)] = values
    for name, parameter in model.named_parameters():
        # A gradient is a sum over tokens of which much cancels.
        assert_close(gradients[name], parameter.grad.flatten(), 4, name)
    (error,) = {rank["error"] for rank in ranks}
    assert error.startswith("step 2: none of the targets in its global batch counts")


def test_held_out_sequences_in_which_nothing_counts_are_no_validation(tmp_path):
    task = task_of(tmp_path)
    split_size = 10_000
    with pytest.raises(AssertionError, match="step 0: none of the targets in the held-out sequences counts"):
        run_ranks(1, masked, task, set(range(split_size)), 0)


def sourced(rank: int, world_size: int, task, weights: list[float], shift: float) -> dict:
    """Validate on two sources, one with the text's even sequences and one with the odd ones."""
    from workers.feed import Feed
    from workers.reports import Validated

    trainer, told = trainer_of(rank, world_size, task)
    whole = list(Feed.validation(trainer.feed))
    feed = trainer.feed
    feed.sources, feed.validation_weights, feed.bytes_per_token = ["wiki", "code"], weights, [4.0, 2.0]
    parts = [((rank + number) % 2, batch) for number, (_, batch) in enumerate(whole)]
    feed.validation = lambda: iter(parts)
    loss = trainer._loss
    trainer._loss = lambda forward, batch: loss(forward, batch) + (shift if batch is whole[1 % len(whole)][1] else 0.0)
    mine = [(source, loss(trainer.engine.model, batch).item(), batch.counted) for source, batch in parts]
    try:
        trainer._validate()
    except TrainingError as error:
        return {"error": str(error)}
    return {"told": told.of(Validated), "mine": mine, "kept": trainer.validation}


def test_each_source_has_a_validation_loss_of_its_own(tmp_path):
    import math

    task = task_of(tmp_path)
    ranks = run_ranks(2, sourced, task, [3.0, 1.0], 0.0)
    (told,) = ranks[0]["told"]
    assert not ranks[1]["told"] and ranks[0]["kept"].items() >= told.items() <= ranks[1]["kept"].items()
    parts = [[one for rank in ranks for one in rank["mine"] if one[0] == source] for source in (0, 1)]
    wiki, code = (sum(loss for _, loss, _ in part) / sum(n for _, _, n in part) for part in parts)
    assert told["by_source"] == {"wiki": pytest.approx(wiki, rel=1e-12), "code": pytest.approx(code, rel=1e-12)}
    assert wiki != code and told["loss"] == pytest.approx((3 * wiki + code) / 4, rel=1e-12)
    assert told["bits_per_byte"] == pytest.approx(told["loss"] / math.log(2) / 3.5, rel=1e-12)
    only = run_ranks(1, sourced, task, [0.0, 1.0], 0.0)[0]["told"][0]
    assert only["loss"] == only["by_source"]["code"], "a source without weight is measured, and moves nothing"


def test_a_source_whose_loss_is_not_finite_is_named(tmp_path):
    (rank,) = run_ranks(1, sourced, task_of(tmp_path), [1.0, 1.0], float("nan"))
    assert rank["error"].startswith("step 0: the validation loss of source code is nan")
