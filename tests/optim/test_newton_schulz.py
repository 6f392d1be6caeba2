"""Newton-Schulz in both forms and with every set of coefficients, against exact arithmetic."""

import pytest
import torch

from optim.newton_schulz import newton_schulz
from optim.polynomials import JORDAN, POLAR_EXPRESS, coefficients, form_of, products, restarts
from optim.reference import ReferenceMuon
from tests.closeness import EPS, ROUNDINGS, gain

pytestmark = pytest.mark.numeric

SHAPES = [(16, 16), (40, 12), (12, 40), (3, 12, 20)]
WITHIN = {"quintic": (0.65, 1.25), "two_phase": (0.6, 1.05), "polar_express": (0.85, 1.15)}
"""Where the singular values of a Gaussian matrix end after five steps (eight of `two_phase`)."""


def gaussian(shape, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one_and_directions_stay(shape, name, form):
    x = gaussian(shape)
    result = newton_schulz(x, coefficients(name, 8 if name == "two_phase" else 5), form)
    assert result.shape == x.shape
    values, (low, high) = torch.linalg.svdvals(result), WITHIN[name]
    assert values.min() > low and values.max() < high
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    diagonal = u.mT @ result @ vh.mT  # The polynomials are odd: the singular vectors are those of x.
    off = diagonal - torch.diag_embed(torch.diagonal(diagonal, dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-9


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("name", WITHIN)
def test_both_forms_apply_the_polynomials_of_the_table(name, steps):
    x = gaussian((6, 10))
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    values = values / values.norm()
    for a, b, c in coefficients(name, steps):
        values = a * values + b * values**3 + c * values**5
    expected = u @ torch.diag(values) @ vh
    assert len(coefficients(name, steps)) == steps
    for form in ("standard", "gram"):
        assert (newton_schulz(x, coefficients(name, steps), form) - expected).abs().max() < 1e-9


def test_each_polar_express_step_is_minimax_on_what_the_ones_before_leave():
    low, high = 1e-3, 1.0
    for a, b, c in POLAR_EXPRESS[:-1]:
        s = torch.linspace(low, high, 200_001, dtype=torch.float64)
        mapped = a * s + b * s**3 + c * s**5
        low, high = mapped.min().item(), mapped.max().item()
        assert low + high == pytest.approx(2.0, abs=1e-6), "the error is as large on both sides of 1"
    assert 1 - low < 1e-6


@pytest.mark.parametrize("decades", [0, 3, 6, 9])
@pytest.mark.parametrize("short", [96, 390])
def test_forms_and_precisions_agree_on_ill_conditioned_matrices(decades, short):
    """In fp32 the standard form enlarges the rounding of a matrix, the gram form that of each row of its square."""
    u, _ = torch.linalg.qr(gaussian((short, short), 1))
    v, _ = torch.linalg.qr(gaussian((3 * short, short), 2))
    x = u @ torch.diag(torch.logspace(0, -decades, short, dtype=torch.float64)) @ v.mT
    exact = newton_schulz(x, form="standard")

    def error(form: str, dtype: torch.dtype) -> float:
        result = newton_schulz(x.float(), form=form, dtype=dtype)
        assert result.dtype == dtype
        return (result.double() - exact).norm().item()

    rounding = ROUNDINGS * EPS * gain(coefficients("quintic", 5))
    assert error("standard", torch.float32) < rounding and error("gram", torch.float32) < rounding * short**0.5
    # In bf16 the smallest singular values are less than rounding, which is enlarged in their stead: by all of them.
    assert (
        error("standard", torch.bfloat16) < 0.25 * exact.norm() and error("gram", torch.bfloat16) < 0.3 * exact.norm()
    )


@pytest.mark.parametrize("steps", [3, 5, 8, 10])
@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("shape", [(96, 128), (352, 128), (390, 1170)])
def test_no_form_blows_up_where_rank_is_missing(shape, name, steps):
    """Rounding makes the Gram matrix indefinite, and every polynomial multiplies that: the gram form begins anew."""
    x, polynomials = gaussian((shape[0], 3), 1) @ gaussian((3, shape[1]), 2), coefficients(name, steps)
    exact = newton_schulz(x, polynomials, "standard")
    rank = torch.linalg.svdvals(exact)[2]
    for form in ("standard", "gram"):
        result = newton_schulz(x.float(), polynomials, form)
        assert torch.linalg.matrix_norm(result.double() - exact, 2) < 0.02 * rank, form
        # In bf16 directions that are not there get up to as large as those that are, but no larger.
        half = newton_schulz(x.float(), polynomials, form, torch.bfloat16)
        assert torch.linalg.matrix_norm(half.float(), 2) < 1.5 * torch.linalg.matrix_norm(exact, 2), form


def test_restarts_are_where_rounding_would_have_grown_too_much():
    assert restarts(coefficients("quintic", 5), "fp32") == () and restarts(coefficients("quintic", 5), "bf16") == (2, 4)
    assert restarts(coefficients("two_phase", 10), "fp32") == (5,)
    assert restarts(coefficients("polar_express", 8), "fp64") == ()


def test_the_form_with_fewer_operations_is_taken():
    assert form_of(64, 64, 5) == "standard" and form_of(1024, 384, 5) == form_of(384, 1024, 5) == "gram"
    assert form_of(704, 484, 5) == "standard" and form_of(704, 484, 5, share=0.625) == "gram"
    short, long = 384, 1024
    # By hand: X X', Q X; the five squares, four products for Q, two for R in four steps.
    by_hand = 2 * short * short * long * 2 + 2 * short**3 * (5 + 4 + 8)
    assert products(5, "gram").operations(long, short) == by_hand
    assert products(5, "standard").operations(long, short) == 5 * (4 * short * short * long + 2 * short**3)
    restarted = products(5, "gram", (2,)).operations(long, short)
    assert restarted == 4 * 2 * short * short * long + 2 * short**3 * (5 + 3 + 6)
    halved = products(5, "gram").operations(long, short, 0.5)
    assert halved == 2 * short * short * long * 1.5 + 2 * short**3 * (5 + 4 + 8) / 2
    assert coefficients("quintic", 3) == (JORDAN,) * 3


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(4, 8, 24), (5, 24, 8), (3, 16, 16), (2, 391, 420)])
def test_batches_and_strided_views_equal_their_matrices_bitwise(shape, form):
    apart = gaussian((shape[0], shape[1] * shape[2] + 37), 1, torch.float32)
    x = apart[:, 5 : 5 + shape[1] * shape[2]].unflatten(1, shape[1:])
    kept = x.clone()
    batch = newton_schulz(x, form=form)
    for matrix, result in zip(kept, batch, strict=True):
        assert torch.equal(newton_schulz(matrix.clone(), form=form), result)
    assert torch.equal(x, kept), "nothing is changed"


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_the_scale_of_a_matrix_does_not_matter_over_all_floats(dtype, within, name, form):
    """From the smallest that there is, of which a matrix holds but a few multiples, to the largest.

    A momentum that decays comes through all of them, and its squares leave the range of fp32 at 1e-23.
    """
    shape, largest = (4, 24, 40), torch.finfo(dtype).max
    x = gaussian(shape).clamp(-1, 1)
    for exponent in range(-149, 129):
        scaled = (x * 2.0**exponent).clamp(-largest, largest).to(dtype)
        exact = newton_schulz(scaled.double(), coefficients(name, 5), "standard")
        result = newton_schulz(scaled, coefficients(name, 5), form)
        assert (result.double() - exact).norm() <= within * exact.norm(), f"times 2^{exponent}"


def test_a_matrix_of_the_smallest_float_is_as_good_as_any():
    smallest = torch.zeros(4, 6)
    smallest[0, 0] = 2.0**-149
    one = torch.zeros(4, 6)
    one[0, 0] = 1.0
    assert newton_schulz(smallest)[0, 0] > 0.6 and torch.allclose(newton_schulz(smallest), newton_schulz(one))


def test_zero_stays_zero_beside_others():
    assert not newton_schulz(torch.zeros(4, 6)).any()
    x = gaussian((4, 6), 5, torch.float32)
    batch = newton_schulz(torch.stack([x, torch.zeros(4, 6)]))
    assert torch.equal(batch[0], newton_schulz(x)) and not batch[1].any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_reference_equals_torch_muon_in_bf16(nesterov):
    """torch.optim.Muon casts to bf16 and matches AdamW's RMS by the same 0.2 sqrt(max(A, B)).

    It takes the norm in bf16, too, ours is fp32: the updates differ by what bf16 rounds, and no more.
    """
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
        assert (a - b).norm() < 0.03 * (a - start).norm()
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
