"""What each step of a run trains with: batch, learning rate, mixture of the data, as pure functions of the step.

A run is one stage after another; one without `stages` is a single one. Nothing of a stage is state: a step is trained
on alike whether the run came to it or went on from it, and whatever the world size.
"""

import operator
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from math import gcd
from typing import Literal

from optim.checks import Check, ConfigProblems, named, no_password, require, within
from optim.config import OptimConfig
from optim.schedule import Curve
from workers.data.config import DataConfig

STEPS = 1000
"""Of a run that says nothing else."""
UNSAVING = {"micro_batch": 1, "recompute": "none", "logits": "whole", "gradients": "whole", "accumulate": "weights"}
"""The keys of `train` that may be automatic, and what they are where no memory is saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """A stage of a run. What it does not say is as in the stage before it; in the first, as in the other sections."""

    name: str
    """What metrics, messages and model cards call it: letters, digits, `-`, `_` and `.`."""
    steps: int = 0
    """Its optimizer steps; 0: as many as come nearest to `tokens`."""
    tokens: float = 0.0
    """Its tokens, in the place of `steps`."""
    global_batch: int = 0
    """Sequences per optimizer step, a multiple of train.micro_batch; 0: as before."""
    schedule: Literal["continue", "cosine", "linear", "constant", "wsd"] = "continue"
    """Of the learning rate: a way of its own, after a warm-up (see optim.schedule); or the one before goes on, and is
    so much longer. In the first stage that is optim's."""
    lr: float = -1.0
    """Where its way begins, after the warm-up; -1: where the stage before it ended, or at optim.lr. 0, for a `linear`
    one alone: it rises to final_lr all along."""
    final_lr: float = 0.0
    """Where it ends; a `constant` one has none."""
    warmup_steps: int = 0
    """Steps of linear warm-up, from where the stage before it ended."""
    decay_fraction: float = 0.2
    """`wsd`: the share of its way that the decay takes."""
    router_bias_rate: float = -1.0
    """In the place of model.router_bias_rate; -1: as before."""
    weights: dict[str, float] = field(default_factory=dict, hash=False)
    """Of the sources of text, by name, in the place of data.sources' own; empty: as before."""

    def __post_init__(self) -> None:
        fixed = {"lr": -1.0, "final_lr": 0.0, "warmup_steps": 0, "decay_fraction": 0.2}
        moot = [key for key, value in fixed.items() if getattr(self, key) != value]
        rises = self.lr == 0
        require(
            self,
            *named(self, "name"),
            *within(self, "[0, inf)", "steps", "tokens", "global_batch", "warmup_steps"),
            (
                (self.steps > 0) != (self.tokens > 0),
                f"steps must be 1 or more, or else tokens be given, not steps={self.steps} and tokens={self.tokens:g}",
            ),
            (
                self.schedule != "continue" or not moot,
                f"{(moot or [''])[0]} needs a schedule of this stage's own: cosine, linear, constant or wsd",
            ),
            (self.lr in (-1, 0) or 1e-8 <= self.lr <= 1, f"lr must be -1 (as before), or 0 to 1, not {self.lr}"),
            (
                not rises or (self.schedule == "linear" and self.final_lr > 0 and not self.warmup_steps),
                "lr=0 is a rise from 0: it needs schedule=linear, a final_lr above 0 and no warmup_steps",
            ),
            (
                self.schedule != "constant" or not self.final_lr,
                f"final_lr={self.final_lr:g} is nothing that a constant rate comes to",
            ),
            *within(self, "[0, 1]", "final_lr", "decay_fraction"),
            (
                self.router_bias_rate == -1 or 0 <= self.router_bias_rate <= 1,
                f"router_bias_rate must be -1 (as before), or 0 to 1, not {self.router_bias_rate}",
            ),
            *(
                (0 <= weight < float("inf"), f"weights.{name} must be 0 or more, not {weight}")
                for name, weight in self.weights.items()
            ),
            (not self.weights or any(self.weights.values()), "weights must have one above 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How much is trained, in which batches, and how often it is validated."""

    steps: int = 0
    """Optimizer steps of the whole run; 0: what `tokens` or `stages` come to, or 1000."""
    tokens: float = 0.0
    """Tokens of the whole run, in the place of `steps`; stages have to add up to them. 0: as steps and stages say."""
    stages: tuple[StageConfig, ...] = ()
    """One after another, each with its length and whatever is new in it; empty: all of the run is one."""
    global_batch: int = 32
    """Sequences per optimizer step, at any world size; a stage may have another number."""
    micro_batch: int = 8
    """Sequences per forward pass; divides global_batch. 0: so many that a step is fastest, of those that fit."""
    seq_len: int = 256
    """Tokens per sequence."""
    validate_every: int = 100
    """Steps between validations; 0 validates at the start and at the end only."""
    validate_sequences: int = 64
    """Held-out sequences per validation, always the same ones."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the forward and backward pass; `auto` is bf16 on a GPU and fp32 on a CPU. Master weights are always fp32."""
    compile: bool = False
    """Each layer is compiled by torch.compile before the first step, which takes a minute and a C++ compiler on every
    node; losses are the same but for rounding. Validation and samples are never compiled."""
    sample_prompt: str = "def "
    """The text from which the trained model writes a sample at the end; empty for none."""
    sample_bytes: int = 200
    """Length of the sample in letters, and in tokens at most."""
    init: str = ""
    """With whose weights a new run begins: a checkpoint (FOLDER or FOLDER@STEP), a run (id or name in MLflow, or with
    @STEP), or a local folder of Hugging Face's, which is imported; empty for random ones."""
    init_state: Literal["weights", "all", "run"] = "weights"
    """What is taken of it: the weights, with the optimizer's state begun anew, or `all`, its state, too; steps begin at
    1. `run`: all that it had, and the new run goes on at the step after, with the data where they were: a branch."""
    max_skipped_in_a_row: int = 10
    """Steps in a row that may be skipped because their gradient is not finite; one more ends the run."""
    recompute: str = "auto"
    """Layers of which the backward pass computes again what the forward pass did not keep: `none`, `all`, or so many of
    the first; a third of the operations more, a fraction of the memory. `auto`, here and below: as fast as fits."""
    logits: Literal["auto", "whole", "chunked"] = "auto"
    """`chunked`: the loss is computed from some tokens after the others, so that all logits are never there at once."""
    gradients: Literal["auto", "whole", "partitioned"] = "auto"
    """`whole`: each worker sums up all gradients, and they are reduced once a step. `partitioned`: they are reduced
    after every micro-batch, and each worker keeps its part, in fp32 (ZeRO-2)."""
    accumulate: Literal["auto", "fp32", "weights"] = "auto"
    """In what whole gradients of several micro-batches are added up: in fp32, or in the precision of the weights."""
    overlap: bool = True
    """On GPUs, reduce gradients during the backward pass, and gather weights during the next forward pass."""

    def __post_init__(self) -> None:
        require(
            self,
            *no_password(self, "init"),
            (
                self.init_state != "run" or bool(re.search(r"@\d+$", self.init)),
                f"init_state=run goes on after a step of another run: init must name both, as RUN@STEP, not "
                f"{self.init!r}",
            ),
            (
                self.recompute in ("auto", "none", "all") or self.recompute.isdecimal(),
                f"recompute must be auto, none, all or a number of layers, not {self.recompute!r}",
            ),
            *within(self, "[1, inf)", "global_batch", "seq_len", "validate_sequences"),
            *within(self, "[0, inf)", "steps", "tokens", "micro_batch", lowest="automatic"),
            (
                self.micro_batch < 1 or self.global_batch % self.micro_batch == 0,
                f"global_batch must be a multiple of micro_batch ({self.micro_batch}), not {self.global_batch}",
            ),
            *within(self, "[0, inf)", "validate_every", lowest="ends only"),
            *within(self, "[0, inf)", "sample_bytes"),
            *within(self, "[0, inf)", "max_skipped_in_a_row", lowest="none"),
        )
        require(self, *self._stage_checks())
        require(self, *self._length_checks())
        object.__setattr__(self, "steps", sum(self.lengths))

    def _stage_checks(self) -> Iterator[Check]:
        names = [stage.name.replace(".", "-") for stage in self.stages]  # As it is in an alias of a registered model.
        twice = sorted({one.name for one, name in zip(self.stages, names, strict=True) if names.count(name) > 1})
        text = f"stages: {', '.join(twice)} is there more than once, . and - being alike; each has a name of its own"
        yield not twice, text
        for number, batch in enumerate(self.batches if self.stages else ()):
            text = f"stages[{number}].global_batch must be a multiple of micro_batch ({self.micro_batch}), not {batch}"
            yield self.micro_batch < 1 or batch % self.micro_batch == 0, text

    def _length_checks(self) -> Iterator[Check]:
        for number, (stage, length) in enumerate(zip(self.stages, self.lengths, strict=False)):
            positions = self.batches[number] * self.seq_len
            text = f"stages[{number}].tokens={stage.tokens:g} are not even half of one step's {positions:,}"
            yield length > 0, f"{text}; a stage has to have a step"
        length, wanted = sum(self.lengths), f"{self.tokens:,.0f} tokens"
        of = f"the {len(self.stages)} stages come to {length:,}" if self.stages else f"{wanted} are {length:,}"
        yield length > 0, f"tokens={self.tokens:g} are not even half of one step's {self.global_batch * self.seq_len:,}"
        yield self.steps in (0, length), f"steps must be left out (0), as {of}, or be that, not {self.steps}"
        if self.stages and self.tokens:
            found = self.seq_len * sum(map(operator.mul, self.lengths, self.batches))
            # Each is so many whole steps as come nearest.
            near = abs(found - self.tokens) <= self.seq_len * sum(self.batches) / 2
            yield near, f"tokens must be what the stages come to, {found:,}, or be left out (0), not {self.tokens:,.0f}"

    @property
    def batches(self) -> tuple[int, ...]:
        """Sequences per step of each stage."""
        grown = accumulate((stage.global_batch for stage in self.stages), _or_before, initial=self.global_batch)
        return tuple(grown)[1:] or (self.global_batch,)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each stage."""
        if not self.stages:
            return (round(self.tokens / (self.global_batch * self.seq_len)) if self.tokens else self.steps or STEPS,)
        tokens = (stage.tokens / (batch * self.seq_len) for stage, batch in zip(self.stages, self.batches, strict=True))
        return tuple(stage.steps or round(steps) for stage, steps in zip(self.stages, tokens, strict=True))

    @property
    def ends(self) -> tuple[int, ...]:
        """The last step of each stage."""
        return tuple(accumulate(self.lengths))

    def of_stage(self, number: int) -> "TrainConfig":
        """Return the stage of a number, from 0, as a run of its own."""
        batch, steps = self.batches[number], self.lengths[number]
        return replace(self, stages=(), tokens=0.0, global_batch=batch, steps=steps)

    @property
    def slots(self) -> int:
        """Micro-batch slots of the largest global batch."""
        return max(self.batches) // max(1, self.micro_batch)

    @property
    def open(self) -> tuple[str, ...]:
        """Return the keys that are automatic: the fastest that fits has to be found, for a number of workers."""
        return tuple(key for key in UNSAVING if getattr(self, key) in (0, "auto"))

    def plain(self) -> "TrainConfig":
        """Return it with what is automatic as it is without any saving of memory."""
        return replace(self, **{key: UNSAVING[key] for key in self.open})

    def recomputed(self, layers: int) -> int:
        """Return how many of so many layers are computed again; `auto` that nobody has decided is none."""
        known = {"auto": 0, "none": 0, "all": layers}
        return known[self.recompute] if self.recompute in known else min(layers, int(self.recompute))

    def validates(self, step: int) -> bool:
        """Tell whether a validation belongs to a step."""
        return step in (0, *self.ends) or bool(self.validate_every and step % self.validate_every == 0)

    @property
    def validations(self) -> int:
        """How many steps of the run have one, the start and the ends of stages included."""
        every = self.validate_every
        if not every:
            return 1 + len(self.ends)
        return 1 + self.steps // every + sum(end % every > 0 for end in self.ends)


def _or_before(before: int, batch: int) -> int:
    return batch or before


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of a run, with all that holds in it."""

    name: str
    """Empty where the run is one stage."""
    first: int
    """Step, from 1."""
    steps: int
    first_sample: int
    """Global index of the first sample of its first step."""
    global_batch: int
    router_bias_rate: float | None
    """None: the model's."""
    weights: Mapping[str, float]
    """Of the sources of text from here on; empty where they are as before."""
    curve: Curve
    """Of the learning rate, which may have begun in an earlier stage."""
    begun: int
    """Units of the curve that went before."""
    units: int
    """Of the curve, in a step."""

    @property
    def last(self) -> int:
        """Its last step."""
        return self.first + self.steps - 1

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.curve.at(self.begun + (step - self.first + 1) * self.units)

    def samples_before(self, step: int) -> int:
        """Return the global index of the first sample of a step."""
        return self.first_sample + (step - self.first) * self.global_batch


class Recipe:
    """What each step of a run trains with.

    Args:
        train: length, batches and stages.
        optim: the learning rate of a run without stages, or of the first ones.
    """

    def __init__(self, train: TrainConfig, optim: OptimConfig) -> None:
        configs = train.stages or (StageConfig(name="all", steps=train.steps),)
        lengths, batches, firsts = train.lengths, train.batches, [1, *(end + 1 for end in train.ends)]
        samples = [0, *accumulate(map(operator.mul, lengths, batches))]
        rates = [None if config.router_bias_rate < 0 else config.router_bias_rate for config in configs]
        biases = list(accumulate(rates, lambda before, rate: before if rate is None else rate))
        begins = [i for i, config in enumerate(configs) if not i or config.schedule != "continue"]
        stages: list[Stage] = []
        for begin, end in pairwise([*begins, len(configs)]):
            unit = gcd(*batches[begin:end])
            units = [batch // unit for batch in batches[begin:end]]
            begun = [0, *accumulate(map(operator.mul, lengths[begin:end], units))]
            before = stages[-1].learning_rate(stages[-1].last) if stages else None
            curve = _curve(configs[begin], optim, before, begun[-1], units[0])
            stages += [
                Stage(
                    name=configs[i].name if train.stages else "",
                    first=firsts[i],
                    steps=lengths[i],
                    first_sample=samples[i],
                    global_batch=batches[i],
                    router_bias_rate=biases[i],
                    weights=configs[i].weights,
                    curve=curve,
                    begun=begun[i - begin],
                    units=units[i - begin],
                )
                for i in range(begin, end)
            ]
        self.stages = tuple(stages)
        self._firsts = firsts[:-1]

    def at(self, step: int) -> Stage:
        """Return the stage of a step; of one beyond the run the last."""
        return self.stages[max(0, bisect_right(self._firsts, step) - 1)]

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step; 1 is the first."""
        return self.at(step).learning_rate(step)

    def samples_before(self, step: int) -> int:
        """Return the global index of the first sample of a step, which is how many went before it."""
        return self.at(step).samples_before(step)

    def mixtures(self, data: DataConfig) -> list[tuple[int, tuple[int, ...]]]:
        """Return the step from which on each mixture holds, and the integer share of each source in it."""
        return data.mixtures([(stage.first, stage.weights) for stage in self.stages if stage.weights])

    def drawn(self, data: DataConfig) -> list[int]:
        """Return how many samples of each source a step takes at most, but for one that the mixture rounds up to."""
        mixtures = self.mixtures(data)
        until = [*(step for step, _ in mixtures[1:]), self.stages[-1].last + 1]
        most = [0] * len(mixtures[0][1])
        for (first, shares), end in zip(mixtures, until, strict=True):
            batches = [stage.global_batch for stage in self.stages if stage.first < end and first <= stage.last]
            largest = max(batches, default=0)
            most = [max(one, -(-largest * share // sum(shares))) for one, share in zip(most, shares, strict=True)]
        return most

    def cut_short(self) -> list[str]:
        """Return a line about each learning rate that does not come about whole."""
        curves = {stage.curve: stage for stage in reversed(self.stages)}
        found = [(stage, curve.cut_short()) for curve, stage in curves.items()]
        return [f"{_where(stage)}the warm-up of the learning rate {text}" for stage, text in found if text]


recipe_of = lru_cache(maxsize=16)(Recipe)


def _curve(config: StageConfig, optim: OptimConfig, before: float | None, length: int, units: int) -> Curve:
    """Return the learning rate of a stage and those that go on with it.

    Args:
        config: of the stage.
        optim: whose learning rate holds where the first stage has none of its own.
        before: rate of the last step before it; None in the first stage.
        length: of all of them, in units.
        units: in a step of the first of them.
    """
    if config.schedule == "continue":
        return optim.curve(length, units)
    if config.lr == 0:
        return Curve(shape="constant", peak=config.final_lr, final=1.0, length=length, warmup=length)
    peak = config.lr if config.lr > 0 else optim.lr if before is None else before
    if not peak:
        text = f"{config.name} begins where the stage before it ended, at a learning rate of 0; give it an lr"
        raise ConfigProblems([f"train.stages: {text}"])
    return Curve(
        shape=config.schedule,
        peak=peak,
        final=config.final_lr / peak,
        length=length,
        warmup=units * config.warmup_steps,
        begin=before or 0.0,
        decay_fraction=config.decay_fraction,
    )


def _where(stage: Stage) -> str:
    return f"stage {stage.name}: " if stage.name else ""
