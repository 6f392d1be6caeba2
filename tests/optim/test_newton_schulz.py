import pytest
import torch

from optim.newton_schulz import newton_schulz
from optim.reference import ReferenceMuon


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (12, 40), (3, 12, 20)])
def test_singular_values_end_near_one_and_directions_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = newton_schulz(x)
    assert result.shape == x.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    diagonal = u.mT @ result @ vh.mT  # The quintic is odd: the singular vectors are those of x.
    off = diagonal - torch.diag_embed(torch.diagonal(diagonal, dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-9


def test_a_batch_equals_its_matrices_bitwise_and_nothing_is_changed():
    x = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    batch = newton_schulz(x)
    for matrix, result in zip(x, batch, strict=True):
        assert torch.equal(newton_schulz(matrix), result)
    assert torch.equal(x, kept)


def test_zero_stays_zero():
    assert not newton_schulz(torch.zeros(4, 6)).any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_reference_equals_torch_muon_in_bf16(nesterov):
    """torch.optim.Muon casts to bf16 and matches AdamW's RMS by the same 0.2 sqrt(max(A, B))."""
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(shape, generator=random) for shape in ((24, 24), (40, 16), (16, 40))]
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}
    mine = ReferenceMuon(ours, ns_dtype=torch.bfloat16, **settings)
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b, start in zip(ours, theirs, weights, strict=True):
        assert (a - b).abs().max() < 1e-6
        assert (a - start).abs().max() > 1e-3


def test_a_stack_of_experts_is_its_matrices():
    random = torch.Generator().manual_seed(3)
    stack = torch.nn.Parameter(torch.randn(3, 8, 12, generator=random))
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    stack.grad = torch.randn(3, 8, 12, generator=random)
    for single, gradient in zip(singles, stack.grad, strict=True):
        single.grad = gradient.clone()
    ReferenceMuon([stack], lr=0.1).step()
    ReferenceMuon(singles, lr=0.1).step()
    assert torch.equal(stack, torch.stack(list(singles)))
