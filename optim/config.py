"""The optimizer's settings."""

import math
from dataclasses import dataclass
from typing import Literal

from optim.checks import require, within
from optim.mup import WidthRule
from optim.polynomials import CoefficientSet, Form, Products, coefficients, form_of, products, restarts
from optim.schedule import Curve, Shape

MOST_DECAY = 0.1
"""Share of every weight that decay may take in one step at the peak of the learning rate."""


def precision_on(kind: str, choice: str = "auto") -> Literal["fp32", "bf16"]:
    """Return what a precision of the config is on a kind of device: `auto` is bf16 on a GPU and fp32 on a CPU."""
    return "bf16" if choice == "bf16" or (choice == "auto" and kind == "cuda") else "fp32"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Muon with weight decay for matrices, AdamW for the rest; one learning rate and one weight decay for both."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon`: matrices by Muon, embeddings, head and norms by AdamW. `adamw`: everything by AdamW."""
    lr: float = 4.2e-4
    """Peak learning rate, shared by Muon and AdamW (Moonlight, section 2.2)."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    momentum: float = 0.95
    """Muon's momentum."""
    nesterov: bool = True
    """Orthogonalize a look-ahead of the momentum instead of the momentum itself."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_coefficients: CoefficientSet = "quintic"
    """Polynomials of the iterations: Jordan's `quintic`; `polar_express`, minimax for each step; `two_phase`, Jordan's
    with two converging ones at the end."""
    ns_form: Literal["auto", "standard", "gram"] = "auto"
    """`gram` builds the product of all polynomials from the Gram matrix; `auto` takes for each shape what needs fewer
    operations."""
    ns_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of Newton-Schulz; `auto` is bf16 on a GPU and fp32 on a CPU."""
    wire_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type in which pieces of straddling matrices travel; `auto` is bf16 on a GPU (Moonlight, algorithm 1) and fp32 on
    a CPU."""
    split: Literal["none", "fused", "heads"] = "none"
    """`none`: each parameter is one matrix, and each expert. `fused`: each of the projections that the model keeps in
    one parameter is a matrix of its own. `heads`: each attention head's part of the projections to heads is, too."""
    update_rms: float = 0.2
    """Root mean square of Muon's update, times the learning rate; 0.2 is about AdamW's (Moonlight, section 2.2)."""
    rms_control: Literal["adjusted_lr", "update_norm"] = "adjusted_lr"
    """How the update gets there: `adjusted_lr` scales by `sqrt(max(A, B))`, as if all singular values were 1
    (Moonlight, equation 4); `update_norm` measures each update and divides by what it finds (the same, table 1)."""
    width_rule: WidthRule = "none"
    """How initial scales, rates and decays follow the width of the model, so that lr and weight_decay found at
    base_width hold at another: `spectral` (Qiu et al., table 1), `essential` (Essential AI's muP), `rms` (initial
    scales by fan-in, all else the same); `none` changes nothing. See docs/transfer.md."""
    base_width: int = 0
    """The model's width at which width_rule changes nothing: where lr, weight_decay and init_std were found; 0 where
    the rule is `none`."""
    qk_clip: float = 0.0
    """Largest attention logit: a head that exceeds it gets its query and key weights scaled down after the step; Kimi
    K2 has 100, 0 turns it off."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    grad_clip: float = 1.0
    """Largest global gradient norm, applied before momentum and orthogonalization; 0 turns clipping off."""
    schedule: Shape = "cosine"
    """After the warm-up: a `cosine` or a straight line (`linear`) to the final rate, the peak all along (`constant`),
    or warm-up-stable-decay (`wsd`): the peak, and a linear decay at the end."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """`wsd`: the share of all steps that the decay takes."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step, as a share of the peak."""

    def __post_init__(self) -> None:
        most_decay = MOST_DECAY / self.lr if 0 < self.lr <= 1 else math.inf
        require(
            self,
            *within(self, "[1e-8, 1]", "lr"),  # Less is lost in the rounding of the weights.
            *within(self, "[1e-20, 1]", "eps"),
            *within(self, "[0, inf)", "weight_decay", "warmup_steps"),
            (
                self.weight_decay <= most_decay,
                f"weight_decay must be at most {most_decay:g} with lr={self.lr} (a tenth of the weights in a step), "
                f"not {self.weight_decay}",
            ),
            *within(self, "[0, 1)", "momentum", "beta1", "beta2"),
            *within(self, "[1, 50]", "ns_steps"),
            *within(self, "[1e-3, 10]", "update_rms"),
            *within(self, "[0, inf)", "base_width"),
            (
                self.width_rule == "none" or self.base_width > 0,
                f"base_width must be the width (model.hidden_size) at which lr was found, where "
                f"width_rule={self.width_rule}; it is {self.base_width}",
            ),
            *(
                (value == 0 or value >= least, f"{key} must be 0 (off) or {least:g} or more, not {value}")
                for key, value, least in (("qk_clip", self.qk_clip, 1), ("grad_clip", self.grad_clip, 1e-3))
            ),
            *within(self, "[0, 1]", "decay_fraction", "final_lr_fraction"),
        )

    def curve(self, length: int, units: int = 1) -> Curve:
        """Return the learning rate of a run.

        Args:
            length: of the run, in units of data.
            units: in a step.
        """
        return Curve(
            shape=self.schedule,
            peak=self.lr,
            final=1.0 if self.schedule == "constant" else self.final_lr_fraction,
            length=length,
            warmup=units * self.warmup_steps,
            decay_fraction=self.decay_fraction,
        )

    @property
    def identity(self) -> dict[str, str | int]:
        """What of it has to be the same for a run to go on, by key; no rule of widths is as if there were no key."""
        rule = {"optim.width_rule": self.width_rule, "optim.base_width": self.base_width}
        return {"optim.name": self.name} | (rule if self.width_rule != "none" else {})

    @property
    def form(self) -> Form | None:
        """The form of all Newton-Schulz iterations; None where each shape has the one that suits it."""
        return None if self.ns_form == "auto" else self.ns_form

    def products(self, rows: int, columns: int) -> Products:
        """Return the products that orthogonalize a matrix."""
        polynomials = coefficients(self.ns_coefficients, self.ns_steps)
        beginnings = restarts(polynomials, "bf16" if self.ns_dtype == "bf16" else "fp32")
        form = self.form or form_of(rows, columns, self.ns_steps, beginnings)
        return products(self.ns_steps, form, beginnings)

    def operations(self, rows: int, columns: int) -> int:
        """Return the floating-point operations that orthogonalize a matrix."""
        return round(self.products(rows, columns).operations(rows, columns))
