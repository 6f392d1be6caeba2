"""The oracle: Muon as the paper states it, in one process, on whole matrices, with nothing shared or batched.

`optim.zero1` is held to this by the tests. It is slow on purpose: one matrix after the other.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from optim.newton_schulz import newton_schulz
from optim.polynomials import CoefficientSet, coefficients


class ReferenceMuon(torch.optim.Optimizer):
    """Muon with decoupled weight decay and matched update RMS (Moonlight, equations 2 to 4).

    The momentum is kept as a mean, `m <- beta m + (1 - beta) g`, as in `torch.optim.Muon`. The paper's sum
    `m <- beta m + g` is the same direction times `1 / (1 - beta)`, and Newton-Schulz removes the factor.

    Args:
        params: parameters `[A, B]` or stacks `[E, A, B]`, of which each slice is a matrix of its own.
        lr: learning rate.
        weight_decay: multiplied by lr.
        momentum: beta.
        nesterov: orthogonalize `beta m + (1 - beta) g`.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: their polynomials; always applied in the standard form.
        ns_dtype: dtype of Newton-Schulz.
        update_rms: root mean square of the update, over lr.
        update_norm: measure the update and divide by what is found, instead of `update_rms * sqrt(max(A, B)) * O`.

    A matrix without a gradient, or with one whose RMS is less than 1e-6 of that of all its parameters, is not moved.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: CoefficientSet = "quintic",
        ns_dtype: torch.dtype = torch.float32,
        update_rms: float = 0.2,
        update_norm: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        self.update_norm = update_norm
        polynomials = coefficients(ns_coefficients, ns_steps)
        super().__init__(
            params, defaults | {"polynomials": polynomials, "ns_dtype": ns_dtype, "update_rms": update_rms}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        gradients = [p.grad.double() for group in self.param_groups for p in group["params"] if p.grad is not None]
        elements = sum(gradient.numel() for gradient in gradients)
        rms = (sum(gradient.square().sum().item() for gradient in gradients) / max(1, elements)) ** 0.5
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum = state["momentum_buffer"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                rows, columns = parameter.shape[-2:]
                scale = group["update_rms"] * max(rows, columns) ** 0.5
                for weight, matrix, gradient in zip(
                    *(tensor.reshape(-1, rows, columns) for tensor in (parameter, update, parameter.grad)), strict=True
                ):
                    if gradient.double().square().mean().sqrt() <= 1e-6 * rms:
                        continue
                    orthogonal = newton_schulz(matrix, group["polynomials"], "standard", group["ns_dtype"])
                    if self.update_norm:
                        scale = group["update_rms"] / orthogonal.float().square().mean().sqrt().item()
                    weight.add_(orthogonal, alpha=-group["lr"] * scale)
