"""Width rules: what a weight's initial scale, learning rate and weight decay are at another width. Pure Python.

Settings that were found at a small width are the best at a large one only if they are carried over by a rule (maximal
update parametrization, muP: Yang and Hu, arXiv 2011.14522 and 2203.03466). A rule says for each parameter by which
factors they differ from those at the base width, of which the settings are. A factor on the output of a layer would
do the same as two on its scale and its rate, so there is none: all that is said here holds of the weight itself.

The width is that of the residual stream. With it grow, in proportion, the numbers of heads and of key and value heads
and the widths of feed-forward layers and experts. What does not: the vocabulary, the width of a head, the number of
experts, the latents of multi-head latent attention (512 in all of DeepSeek's models), depth.

Invariant: at the base width, and where the rule is `none`, every factor is exactly one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

from optim.layout import Fragment

WidthRule = Literal["none", "rms", "spectral", "essential"]
Role = Literal["embedding", "hidden", "narrowing", "widening", "head", "vector"]
Method = Literal["muon", "adamw"]

GROWS: Mapping[Role, tuple[bool, bool]] = {
    "embedding": (True, False),
    "hidden": (True, True),
    "narrowing": (False, True),
    "widening": (True, False),
    "head": (False, True),
    "vector": (True, False),
}
"""Whether what goes out of a map grows with the width, and whether what comes in does. `narrowing`: a router, the way
down to latents; `widening`: the way up from them; `vector`: gains of norms and biases, maps from one number."""


@dataclass(frozen=True, slots=True)
class Step:
    """The factors of what happens to a weight in a step: `w <- (1 - decay lr wd) w - rate lr update`."""

    rate: float = 1.0
    decay: float = 1.0


UNSCALED = Step()


@dataclass(frozen=True)
class Parametrization:
    """A rule, and what it has to know of a model."""

    rule: WidthRule = "none"
    ratio: float = 1.0
    """The model's width over the base's."""
    roles: Mapping[str, Role] = field(default_factory=dict)
    """Of all parameters, by name; none are needed where nothing is scaled."""
    cut: frozenset[str] = frozenset()
    """Parameters of which Muon takes parts for matrices of their own: a part does not get more rows."""

    @property
    def scales(self) -> bool:
        """Tell whether it changes anything."""
        return self.rule != "none" and self.ratio != 1.0

    def std(self, name: str, rows: int, columns: int) -> float:
        """Return the factor of the initial standard deviation of a matrix."""
        return std(self.rule, self.ratio, self.roles[name], rows, columns) if self.scales else 1.0

    def step(self, name: str, method: Method, rows: int = 1, columns: int = 1) -> Step:
        """Return the factors of a step of a parameter, or of a matrix of so many rows and columns in it."""
        if not self.scales:
            return UNSCALED
        out, into = GROWS[self.roles[name]]
        grows = out and name not in self.cut, into
        return Step(rate(self.rule, self.ratio, grows, method, rows, columns), self.decay(name))

    def decay(self, name: str) -> float:
        """Return the factor of the share of a parameter that decays in a step."""
        return decay(self.rule, self.ratio, *GROWS[self.roles[name]]) if self.scales else 1.0

    def largest_decay(self) -> float:
        """Return the largest of these factors of all parameters."""
        return max((self.decay(name) for name in self.roles), default=1.0)


STANDARD = Parametrization()
"""As if there were no rule."""


def std(rule: WidthRule, ratio: float, role: Role, rows: int, columns: int) -> float:
    """Return the factor of a matrix's initial standard deviation.

    `rms`: 1 / sqrt(fan_in), as is usual without a rule. `essential`: the variance 1 / fan_in of a hidden matrix and
    1 / fan_in^2 of what maps to a fixed size (Essential AI, arXiv 2505.02222, figure 5). `spectral`: for a spectral
    norm of sqrt(fan_out / fan_in), `min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in)` (Yang, Simon and Bernstein, arXiv
    2310.17813, section 4), and 1 / fan_in for the head (Qiu et al., arXiv 2512.05620, table 1).
    """
    out, into = GROWS[role]
    if rule == "none" or not (into or role == "widening"):
        return 1.0
    if rule == "rms":
        return ratio**-0.5 if into else 1.0
    if rule == "spectral" and role != "head":
        return _over_base(_spectral_std, ratio, (out, into), rows, columns)
    return ratio**-0.5 if out and into else 1 / ratio if into else 1.0


def rate(rule: WidthRule, ratio: float, grows: tuple[bool, bool], method: Method, rows: int, columns: int) -> float:
    """Return the factor of a matrix's learning rate.

    `none` and `rms`: one; Muon's update has an RMS of 0.2 at every width (Moonlight, arXiv 2502.16982, equation 4).
    `essential`: 1 / fan_in whatever the optimizer is, where the fan-in grows. `spectral`: the same for AdamW; Muon's
    update gets a spectral norm of sqrt(fan_out / fan_in) (arXiv 2512.05620, table 1), in the place of Moonlight's
    sqrt(max(fan_out, fan_in)).

    Args:
        rule: of the widths.
        ratio: the width over the base's.
        grows: whether its rows do, and whether its columns do.
        method: that trains it.
        rows: of the matrix that is orthogonalized.
        columns: alike.
    """
    if rule in ("none", "rms"):
        return 1.0
    if rule == "spectral" and method == "muon":
        return _over_base(_spectral_rate, ratio, grows, rows, columns)
    return 1 / ratio if grows[1] else 1.0


def decay(rule: WidthRule, ratio: float, out: bool, into: bool) -> float:
    """Return the factor of the share of a parameter that decays in a step.

    `none` and `rms`: one. `spectral`: 1 / width for all (arXiv 2512.05620, section 4: the independent weight decay).
    `essential`: that of the rate on the parameter inside of its multiplier (arXiv 2505.02222, figure 5 and section 2):
    1 / width for hidden matrices, 1 / sqrt(width) for the others.
    """
    if rule == "spectral" or (rule == "essential" and out and into):
        return 1 / ratio
    return ratio**-0.5 if rule == "essential" else 1.0


def _spectral_std(out: float, into: float) -> float:
    """Return the standard deviation at which a random matrix has about the spectral norm `sqrt(out / into)`."""
    return min(1.0, sqrt(out / into)) / sqrt(into)


def _spectral_rate(out: float, into: float) -> float:
    """Return the spectral norm that an update is to have over the one that it has."""
    return sqrt(out / into) / sqrt(max(out, into))


def _over_base(
    size: Callable[[float, float], float], ratio: float, grows: tuple[bool, bool], rows: int, columns: int
) -> float:
    if all(grows):
        return ratio**-0.5  # Of both sizes, whatever the shape.
    base = (dimension / ratio if grew else dimension for dimension, grew in zip((rows, columns), grows, strict=True))
    return size(rows, columns) / size(*base)


def stretches(
    fragments: Iterable[Fragment], numel: int, step: Callable[[str], Step]
) -> dict[Step, list[tuple[int, int]]]:
    """Return the intervals `[first, last)` of a flat shard by what happens to them in a step.

    Neighbours with the same factors are one interval, and what fills the shard up belongs to the last, so that a shard
    with the same factors all along is treated as a whole.

    Args:
        fragments: that lie in the shard, in order.
        numel: of the shard.
        step: factors of a parameter.
    """
    borders: list[tuple[int, Step]] = []
    for fragment in fragments:
        if not borders or borders[-1][1] != step(fragment.name):
            borders.append((fragment.offset if borders else 0, step(fragment.name)))
    found: dict[Step, list[tuple[int, int]]] = {}
    ends = [*(first for first, _ in borders[1:]), numel]
    for (first, factors), last in zip(borders, ends[: len(borders)], strict=True):  # A shard may hold nothing.
        found.setdefault(factors, []).append((first, last))
    return found
