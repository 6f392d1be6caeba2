"""`raymuon study coordinates`: whether activations stay as large as they are when a model gets wider.

The check of a rule of widths (Yang and Hu, arXiv 2203.03466, appendix D.1): models of doubling widths train a few steps
at one learning rate. Where the rule is right, how far their activations have moved does not depend on the width; where
it is not, that grows or shrinks as a power of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, get_args

from jobs.load import load
from jobs.planning.widths import scaled
from jobs.screen import Screen
from jobs.table import print_table
from jobs.tell import tell
from optim.mup import WidthRule
from orchestrator.config import RunConfig, absolute
from workers.common.errors import ConfigError
from workers.config import ModelConfig

GROWING = ("hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "moe_intermediate_size")
"""What grows with the width, in proportion; see `optim.mup`."""
FLAT = 0.15
"""A power of the width that is smaller than this is none: over four doublings a factor of 1.5."""
STEEP = 0.25
"""One that is larger is no matter of chance: a factor of 2 over four doublings."""


@dataclass(frozen=True)
class Coordinate:
    """How large one activation is at each width under a rule."""

    rule: str
    name: str
    widths: tuple[int, ...]
    rms: tuple[float, ...]
    """After the steps; of several seeds the geometric mean."""
    change: tuple[float, ...]
    """Root mean square of the change since the beginning, alike."""

    @property
    def power(self) -> float:
        """Return p, where the change is `width^p`: the slope over logarithms."""
        return slope(self.widths, self.change)

    @property
    def verdict(self) -> str:
        """Return what the power says."""
        size = abs(self.power)
        return "flat" if size <= FLAT else "unclear" if size < STEEP else "grows" if self.power > 0 else "shrinks"

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**asdict(self), "power": self.power, "verdict": self.verdict}


def slope(widths: Sequence[float], sizes: Sequence[float]) -> float:
    """Return the slope of the logarithms, by least squares."""
    x, y = ([math.log(max(value, 1e-300)) for value in values] for values in (widths, sizes))
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """Return the model at another width, all that grows with it in proportion.

    Raises:
        ConfigError: something would not be whole, or the model does not take it.
    """
    sizes = {field.name: getattr(model, field.name) for field in fields(model) if field.name in GROWING}
    if "hidden_size" not in sizes:
        raise ConfigError(f"model.name={model.name}: it has no hidden_size, which is what the widths are of")
    scaled = {key: value * width / sizes["hidden_size"] for key, value in sizes.items()}
    if broken := {key: value for key, value in scaled.items() if value != int(value)}:
        texts = (f"model.{key}={sizes[key]} would be {value:g}" for key, value in broken.items())
        raise ConfigError(f"--width {width}: {', '.join(texts)}; set sizes that stay whole at every width")
    try:
        return replace(model, **{key: int(value) for key, value in scaled.items()})  # type: ignore[type-var]
    except ValueError as error:
        raise ConfigError(f"--width {width}: model.{error}") from error


def ruled(config: RunConfig, rule: str, width: int, base: int, seed: int) -> RunConfig:
    """Return the config of one of the models.

    Raises:
        ConfigError: the width is not possible, or not with the rule.
    """
    try:
        optim = replace(config.optim, width_rule=rule, base_width=base)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"--width {width}: optim.{error}") from error
    model = at_width(config.model, width)
    scaled(model, optim)  # What a rule refuses is told before anything trains.
    return replace(config, model=model, optim=optim, seed=seed)


def coordinates(
    config: RunConfig,
    widths: Sequence[int],
    rules: Sequence[str],
    seeds: Sequence[int],
    train: Callable[[RunConfig], Mapping[str, tuple[float, float]]],
    say: Callable[[str], None] = lambda text: None,
) -> list[Coordinate]:
    """Train the models and return how large each activation is, rule by rule.

    Args:
        config: of all; its `optim.lr` is that of the base width, `optim.base_width`, or the smallest one.
        widths: two or more.
        rules: of `optim.width_rule`.
        seeds: each model is trained once with each.
        train: trains one of them, and returns the RMS of each activation and of its change.
        say: told of each.

    Raises:
        ConfigError: a width is not possible.
    """
    if len(set(widths)) < 2:
        raise ConfigError("--width: a power of the width needs two or more of them, for instance --width 32 --width 64")
    widths, base = sorted(set(widths)), config.optim.base_width or min(widths)
    configs = {
        (rule, width, seed): ruled(config, rule, width, base, seed)
        for rule in rules
        for width in widths
        for seed in seeds
    }  # All of them, before the first one trains.
    found = {}
    for (rule, width, seed), one in configs.items():
        say(f"{rule}, width {width}, seed {seed}")
        found[rule, width, seed] = train(one)
    names = next(iter(found.values()))

    def mean(rule: str, name: str, which: int) -> tuple[float, ...]:
        logs = [[math.log(max(found[rule, width, seed][name][which], 1e-300)) for seed in seeds] for width in widths]
        return tuple(math.exp(sum(one) / len(one)) for one in logs)

    return [
        Coordinate(rule, name, tuple(widths), mean(rule, name, 0), mean(rule, name, 1))
        for rule in rules
        for name in names
    ]


def show(
    name: str, overrides: list[str], widths: Sequence[int], rules: Sequence[str], steps: int, seeds: int, as_json: bool
) -> None:
    """Train the models in this process and print how far their activations have moved.

    Raises:
        ConfigError: the config or a width is not possible, or there is no such rule.
        TrainingError: an activation is not finite.
    """
    if unknown := sorted(set(rules) - set(get_args(WidthRule))):
        raise ConfigError(f"--rule {unknown[0]}: is none; known are {', '.join(get_args(WidthRule))}")
    config = absolute(load(name, overrides))
    console = Screen(stderr=True)
    with console.status("reading the text") as status:
        # Torch and DeepSpeed take seconds to import.
        from jobs.study.activations import sizes_after
        from workers.data.prepare import prepare

        corpora = prepare(config.data)
        train = partial(sizes_after, corpora, steps)
        found = coordinates(config, widths, rules, range(config.seed, config.seed + seeds), train, status.update)
    if as_json:
        tell({"steps": steps, "seeds": seeds, "lr": config.optim.lr, "coordinates": [one.as_dict() for one in found]})
        return
    head = ("rule", "change of", *map(str, found[0].widths), "power of the width", "")
    print_table(Screen(), head, rows(found), f"RMS after {steps} steps, of the change since the beginning")


def rows(found: Sequence[Coordinate]) -> list[list[str]]:
    """Return the cells of a table: rule, activation, its change at each width, the power, the verdict."""
    return [
        [one.rule, one.name, *(f"{change:.3g}" for change in one.change), f"{one.power:+.2f}", one.verdict]
        for one in found
    ]
