"""Scores of continuations against plain code: one sequence after another, all logits, no batches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.jobs.test_export import MODELS
from workers.models import build, logits_of
from workers.scoring import score

SEQ_LEN = 24


def model_of(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return build(replace(MODELS[name], vocab_size=300)).to(dtype).eval()


@torch.no_grad()
def plain(model, context, continuation) -> tuple[float, bool]:
    """Return the score of one pair, from all logits of its sequence."""
    ids = torch.tensor([*context, *continuation])[-SEQ_LEN - 1 :]
    logits = logits_of(model, ids[None, :-1])[0, -len(continuation) :].double()
    likely = F.log_softmax(logits, -1)[torch.arange(len(continuation)), torch.tensor(continuation)]
    return likely.sum().item(), logits.argmax(-1).tolist() == list(continuation)


def pairs_of(model) -> list[tuple[list[int], list[int]]]:
    """Return pairs of all lengths, two of one input, one too long, and one that the model would write itself."""
    random = torch.Generator().manual_seed(1)

    def ids(number: int) -> list[int]:
        return torch.randint(0, 300, (number,), generator=random).tolist()

    sizes = [(1, 1), (1, SEQ_LEN), (SEQ_LEN, 1), (5, 3), (3, 5), (60, 2), (60, SEQ_LEN), (7, 7), (2, 1)]
    pairs = [(ids(before), ids(after)) for before, after in sizes]
    shared = ids(9)
    pairs += [(shared, [token]) for token in (3, 4, 299)] + [(shared[:8], [shared[8], 5])]
    written = list(shared)
    for _ in range(4):
        written.append(int(logits_of(model, torch.tensor([written]))[0, -1].argmax()))
    return [*pairs, (shared, written[9:]), (shared, [*written[9:12], (written[12] + 1) % 300])]


@pytest.mark.numeric
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_plain_code_whatever_the_batch(name):
    model = model_of(name)
    pairs = pairs_of(model)
    expected = [plain(model, *pair) for pair in pairs]
    assert [greedy for _, greedy in expected].count(True) >= 1 and not expected[-1][1] and expected[-2][1]
    for batch_tokens in (1, 50, 10**6):
        told = []
        found = score(model, pairs, SEQ_LEN, batch_tokens, told.append)
        assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=2e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert told[-1] == len(pairs) and told == sorted(set(told))
    assert score(model, pairs[::-1], SEQ_LEN, 50)[::-1] == [(pytest.approx(one, abs=2e-5), g) for one, g in expected]
    assert score(model, [], SEQ_LEN, 50) == []


def test_one_input_goes_through_the_model_once():
    model, sizes = model_of("llama"), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
    score(model, [([1, 2, 3], [token]) for token in range(200)], SEQ_LEN, 10**6)
    assert sizes == [(1, 3)]


def test_scores_in_bf16_are_summed_and_compared_in_fp32():
    """In bf16 the logits of many tokens are equal, and their sum has three digits."""
    model = model_of("llama", torch.bfloat16)
    context, continuation = [1, 2, 3], list(range(40, 60))
    with torch.no_grad():
        hidden = model(torch.tensor([[*context, *continuation][:-1]]))[0, -20:]
        likely = F.log_softmax(hidden.double() @ model.head.double().T, -1)
    expected = likely[torch.arange(20), torch.tensor(continuation)].sum().item()
    ((found, _),) = score(model, [(context, continuation)], SEQ_LEN, 100)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * (SEQ_LEN + 1))])
def test_what_has_no_score_is_refused(pair):
    with pytest.raises(ValueError, match="pair 1"):
        score(model_of("llama"), [([1], [2]), pair], SEQ_LEN, 100)
