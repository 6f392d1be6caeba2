"""What the kernels tell of themselves, against what torch really does."""

import pytest
import torch
from torch import Tensor

from workers.models.kernels import Kernel, attention, rms_norm
from workers.models.layers import RMSNorm

HEADS = [(2, 6, 32, 16), (2, 6, 32, 16), (2, 6, 32, 16)]
SHARED = [(2, 6, 32, 16), (2, 2, 32, 16), (2, 2, 32, 16)]


def arguments_of(kernel: Kernel, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Return leaves, as the models give them: heads lie beside each other."""
    return [torch.randn(batch, time, heads, dim).transpose(1, 2) for batch, heads, time, dim in shapes]


@pytest.mark.parametrize(
    ("kernel", "shapes"),
    [(attention, HEADS), (attention, SHARED)],
    ids=["alike", "shared"],
)
def test_a_kernel_keeps_and_returns_what_it_tells(kernel, shapes):
    arguments = arguments_of(kernel, shapes)
    learned = [one.requires_grad_() for one in arguments if one.is_floating_point()]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = kernel(*arguments)
    gradients = torch.autograd.grad(result.square().sum(), learned)
    told = kernel.cost("cpu", *arguments)
    assert told is not None
    assert (told.result.shape, told.result.dtype) == (result.shape, result.dtype)
    # Torch's keeps two numbers of its random state, too, though nothing is random here.
    assert sum(kept.values()) == pytest.approx(sum(one.nbytes for one in told.kept), abs=64)
    # As a stand-in makes them: what lies otherwise is copied where it is added up.
    assert [one.stride() for one in gradients] == [torch.empty_like(one).stride() for one in learned]


def test_a_cpu_has_no_kernel_for_two_widths_of_heads_nor_for_the_norm():
    q, v = torch.randn(1, 2, 8, 24), torch.randn(1, 2, 8, 16)
    assert attention.cost("cpu", q, q, v) is None
    on_gpu = attention.cost("cuda", q, q, v)
    assert on_gpu is not None and on_gpu.result.shape == attention(q, q, v).shape
    x, norm = torch.randn(3, 5, 8), RMSNorm(8, eps=1e-5)
    assert rms_norm.cost("cpu", x, norm.weight, norm.eps) is None
    on_gpu = rms_norm.cost("cuda", x, norm.weight, norm.eps)
    assert (
        on_gpu is not None
        and on_gpu.result.shape == x.shape
        and [one.shape for one in on_gpu.kept] == [(3, 5, 8), (8,), (3, 5, 1)]
    )
    assert torch.equal(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight, 1e-5))
