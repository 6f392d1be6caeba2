"""What is remembered of an op is what torch says of it again, so that a plan is the same with it and without."""

import pytest
import torch

from jobs.load import load
from jobs.planning import work
from jobs.planning.remembered import fresh_of, question_of
from jobs.planning.work import OpRecorder, micro_batch_of

aten = torch.ops.aten


class Forgetful(dict):
    """Remembers nothing."""

    def __setitem__(self, key, value):
        pass


@pytest.mark.parametrize("name", ["demo", "demo-llama"])
@pytest.mark.parametrize(("kind", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
@pytest.mark.parametrize("saving", [False, True])
def test_a_micro_batch_takes_the_same_whatever_is_remembered(monkeypatch, name, kind, dtype, saving):
    given = (load(name, []).model, 2, 64, dtype, kind, kind == "cpu", not saving, int(saving), saving)
    monkeypatch.setattr(work, "_KNOWN", Forgetful())
    exact = micro_batch_of.__wrapped__(*given)
    known = {}
    monkeypatch.setattr(work, "_KNOWN", known)
    assert micro_batch_of.__wrapped__(*given) == exact and known
    assert micro_batch_of.__wrapped__(*given) == exact, "and where all of it is known"


def test_what_is_made_again_has_memory_of_its_own_and_all_that_torch_gave_it(monkeypatch):
    monkeypatch.setattr(work, "_KNOWN", {})
    x = torch.empty(4, 6, device="meta").T
    with OpRecorder() as recorder:
        first, again = x + 1, x + 1
    assert (again.shape, again.stride(), again.dtype) == (first.shape, first.stride(), first.dtype)
    assert again.untyped_storage()._cdata != first.untyped_storage()._cdata
    assert recorder.peak() == 2 * 4 * 6 * 4


def test_a_view_and_what_is_changed_in_place_stay_what_they_are(monkeypatch):
    monkeypatch.setattr(work, "_KNOWN", {})
    x = torch.empty(4, 6, device="meta")
    with OpRecorder() as recorder:
        for _ in range(3):
            assert x.view(6, 4)._base is x and x.add_(1) is x
    assert recorder.peak() == 0 and sum(recorder.works.values()) == 6


def test_what_makes_a_difference_is_part_of_the_question():
    x = torch.empty(4, 4, device="meta")
    calls = [(aten.add.Tensor, (one, other), {}) for one in (x, x.T, x.int()) for other in (1, 1.0, True, x)]
    calls += [(aten.sum.dim_IntList, (x, dims), {"keepdim": keep}) for dims in ([0], [1]) for keep in (False, True)]
    questions = [question_of(*call) for call in calls]
    assert None not in questions and len(set(questions)) == len(calls)
    assert question_of(aten.add.Tensor, (torch.ones(4), 1), {}) is None, "data may decide"


def test_a_result_that_shares_memory_cannot_be_made_again():
    x = torch.empty(4, 4, device="meta")
    assert fresh_of(x.T, [x]) is None and fresh_of((y := x + 1, y.T), [x]) is None
    assert fresh_of(torch.empty(9, device="meta")[:4], [x]) is None, "of more memory than it shows"
    assert fresh_of([x + 1], [x]) is None and fresh_of((), [x]) != fresh_of(x + 1, [x])
