"""What the models have in common."""

import torch
from torch import Tensor, nn

from workers.models.cache import Mask
from workers.models.feed_forward import swiglu_product
from workers.models.kernels import rms_norm
from workers.models.language_model import LanguageModel


class Embedding(nn.Embedding):
    """A table of vectors; on the meta device nothing is drawn, for which torch would import its compiler, 1.5 s."""

    def reset_parameters(self) -> None:
        """Draw the weights, as torch does."""
        if not self.weight.is_meta:
            super().reset_parameters()


def rotary(time: int, dim: int, theta: float, device: torch.device, mask: Mask | None = None) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary positions in fp32: `[time, dim / 2]`, or `[batch, 1, time, dim / 2]`.

    Args:
        time: tokens of a sequence.
        dim: of a head.
        theta: base of the wave lengths.
        device: for the result.
        mask: of documents, at whose beginnings the positions start anew; or a cache, behind which they go on.
    """
    frequency = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if mask is not None:
        angle = mask.positions.float()[:, None, :, None] * frequency
        return angle.cos(), angle.sin()
    angle = torch.outer(torch.arange(time, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def training_flops(model: LanguageModel, visited: float, attention_width: int, seq_len: int) -> float:
    """Return the floating-point operations of training on one token: two per multiply-add, backward twice the forward.

    What is computed anew or for a token's future is not counted: no recomputation, and half of the square of scores.

    Args:
        model: its matrices but the embedding's are multiplied with.
        visited: share of a stack of experts that a token visits.
        attention_width: query (or key) and value widths of all heads in all layers, summed.
        seq_len: tokens per sequence.
    """
    looked_up = model.embeddings()
    active = sum(
        parameter.numel() * (visited if parameter.dim() == 3 else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and (name not in looked_up or parameter is model.head)
    )
    return 3 * 2 * (active + attention_width * seq_len / 2)


def replicated(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that every rank holds alike and that training changes: those that are saved with the run."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


class RMSNorm(nn.RMSNorm):
    """torch's, by a kernel of which a plan knows the cost."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., width]` to the same."""
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """The dense feed-forward layer, and the shared experts."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Map `[..., hidden]` to the same; the mask is for experts, which count by it, in the same place."""
        return swiglu_product(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)
