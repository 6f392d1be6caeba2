"""How noisy the gradient is: the simple noise scale `tr(Sigma) / |G|^2`, in tokens (arXiv 1812.06162, appendix A.1).

Each micro-batch's gradient is measured as autograd hands it over: before it is added to those of the others, before
anything is reduced, whole or in parts. So it costs one reading of the gradients and no memory, and changes nothing of
them. Squares of what is weighted as the loss is make the estimates unbiased however uneven the micro-batches are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PIECE = 1 << 22
"""Elements that are measured at once: their squares lie beside all that a backward pass keeps."""
SMOOTHING = 0.9
"""What is left of the parts of the scale at each next measurement: a ratio of two noisy numbers is none of its own."""


@dataclass(frozen=True)
class Parts:
    """What the noise scale is the ratio of."""

    variance: float
    """tr(Sigma): of the gradient of one token's loss, over all parameters; a mean over n tokens has 1/n of it."""
    squared_norm: float
    """|G|^2 of the gradient without noise; an estimate without bias, so it may be negative."""


def parts_of(weighted: float, micro_batches: float, squared_norm: float, tokens: int) -> Parts | None:
    """Return the parts for one step; None where a single micro-batch tells nothing of the noise.

    With g_i the mean gradient of micro-batch i over its n_i tokens, and w_i = n_i / T, g = sum w_i g_i:
    `E |g|^2 = |G|^2 + tr(Sigma) / T` and `E sum w_i |g_i|^2 = |G|^2 + M tr(Sigma) / T`.

    Args:
        weighted: `sum w_i |g_i|^2` over the global batch.
        micro_batches: M, those in which something counts.
        squared_norm: `|g|^2`.
        tokens: T, targets that count in the global batch.
    """
    if micro_batches < 2:
        return None
    noise = (weighted - squared_norm) / (micro_batches - 1)
    return Parts(tokens * noise, squared_norm - noise)


class NoiseScale:
    """The ratio over the measurements so far, the latest weighing most: of its parts, each smoothed by itself."""

    def __init__(self) -> None:
        self._variance = self._squared_norm = 0.0

    def of(self, parts: Parts) -> float | None:
        """Return the scale in tokens after one more measurement; None as long as the noise hides the gradient."""
        self._variance = SMOOTHING * self._variance + (1 - SMOOTHING) * parts.variance
        self._squared_norm = SMOOTHING * self._squared_norm + (1 - SMOOTHING) * parts.squared_norm
        return self._variance / self._squared_norm if self._squared_norm > 0 else None


class MicroBatchNorms:
    """Measures the gradients of this rank's micro-batches, between `start` and `stop`."""

    def __init__(self, model: nn.Module, world_size: int) -> None:
        self.parameters, self.world_size = list(model.parameters()), world_size
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._square = self._weighted = torch.zeros((), dtype=torch.float64)
        self._count = 0

    def start(self) -> None:
        """Begin to measure."""
        self.stop()
        self._square = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        self._weighted, self._count = torch.zeros_like(self._square), 0
        self._handles = [parameter.register_hook(self._see) for parameter in self.parameters]

    def add(self, counted: int, tokens: int) -> None:
        """Take what was seen since the last call as one micro-batch's gradient.

        Args:
            counted: its targets that count.
            tokens: those of the global batch, by which the loss was divided; DeepSpeed averages over the ranks.
        """
        if counted:
            self._weighted += self._square * (tokens / counted / self.world_size**2)
            self._count += 1
        self._square.zero_()

    def stop(self) -> Tensor:
        """End, and return this rank's share of `sum w_i |g_i|^2`, and how many micro-batches are in it: fp64 `[2]`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return torch.tensor([self._weighted.item(), self._count], dtype=torch.float64)

    def _see(self, gradient: Tensor) -> None:
        for piece in gradient.detach().reshape(-1).split(PIECE):
            self._square += piece.float().square().sum(dtype=torch.float64)
