"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear", "constant", "wsd"]
"""What comes after a warm-up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The learning rate over a stretch of a run.

    A straight warm-up, then a shape: a cosine (Moonlight, table 1) or a line to the final rate, the peak all along, or
    warm-up-stable-decay: the peak until the last `decay_fraction` of all, then a line.

    It is measured in units of data, so that it goes its way where the batch grows; with one batch a unit is a step.
    """

    shape: Shape
    peak: float
    """After the warm-up."""
    final: float
    """At its end, as a share of the peak."""
    length: int
    """Units, the warm-up included."""
    warmup: int = 0
    """Units."""
    begin: float = 0.0
    """Before the first of them; a warm-up goes from there to the peak."""
    decay_fraction: float = 0.0
    """`wsd`: the share of all units that the decay takes."""

    def at(self, unit: int) -> float:
        """Return the learning rate of the step with which so many units are trained on."""
        if unit <= self.warmup:
            return self.begin + (self.peak - self.begin) * unit / self.warmup
        return self.peak * (self.final + (1 - self.final) * self._share(unit))

    def _share(self, unit: int) -> float:
        """Return what is left of the way from the peak to the final rate: 1 to 0."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "wsd":
            decay = self.decay_fraction * self.length
            return min(1.0, max(0, self.length - unit) / decay) if decay else 1.0
        progress = min(1.0, (unit - self.warmup) / max(1, self.length - self.warmup))
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1.0 - progress

    def cut_short(self) -> str:
        """Return what it leaves out of itself, in words that go behind `warm-up of N`; empty where it is whole."""
        share = self.at(min(self.warmup + 1, self.length)) / self.peak
        if self.warmup > self.length - (self.shape != "constant"):  # A rise that is constant at its end is whole.
            return f"is all of it: the learning rate ends at {share:.2f} of the peak"
        if self.shape == "wsd" and self.warmup > (1 - self.decay_fraction) * self.length:
            return f"ends within the decay: the learning rate falls from the peak to {share:.2f} of it at once"
        return ""
