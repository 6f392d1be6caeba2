"""Does Muon pay, and how much: the loss over the compute, each optimizer tuned at each size, and the ratio of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jobs.build import refuse_all
from jobs.study.question import Answer, Outcome, Study, Trial, points
from jobs.study.scaling.answer import answer_of
from jobs.study.scaling.plan import Plan
from jobs.study.tuning import LEAST_STEPS, optimizer_problems, seed_problems, tuning_checks
from optim.checks import require
from orchestrator.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """Sizes times optimizers, as docs/scaling-law.md says."""

    name: Literal["scaling-law"] = "scaling-law"
    """Question."""
    tokens_per_parameter: tuple[float, ...] = ()
    """Budgets: tokens for each parameter that is not in embedding or head."""
    tokens: tuple[float, ...] = ()
    """Budgets, in the place of tokens_per_parameter: tokens, the same at each size."""
    flops: tuple[float, ...] = ()
    """Budgets, in the place of tokens_per_parameter: floating-point operations of the model, the same at each size."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate around which each optimizer is tuned, by its name on the axis `optimizer`."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Times these rates: the grid of each optimizer at each size."""
    weight_decays: tuple[float, ...] = ()
    """All of them are tried with each rate; empty: as the config has it."""
    extend: int = 2
    """Rounds by which a grid grows at most where its best is at an end; each optimizer then gets one more trial."""
    centre: Literal["start", "previous"] = "start"
    """Around what a size is tuned: `start`: the rates above; `previous`: the best of the size before it."""
    reuse: str = ""
    """An optimizer whose best rate and decay the others take as they are, as Moonlight did; empty: all are tuned."""
    branched: bool = False
    """Several budgets of a size out of one run: decays that branch off from it; needs optim.schedule=wsd."""
    warmup: float = 0.05
    """Share of a budget's steps in which the rate rises; 0: optim.warmup_steps as it is."""
    baseline: str = "adamw"
    """The optimizer whose cost is divided by that of the others."""

    def __post_init__(self) -> None:
        kinds = [key for key in ("tokens_per_parameter", "tokens", "flops") if getattr(self, key)]
        ordered = all(0 < one < other for one, other in zip(self.factors, self.factors[1:], strict=False))
        require(
            self,
            (
                len(kinds) == 1,
                f"tokens_per_parameter, tokens or flops: give budgets by one of them, not by {len(kinds)}",
            ),
            (all(budget > 0 for budget in self.budgets), f"{(kinds or ['tokens'])[0]} must all be above 0"),
            (len(set(self.budgets)) == len(self.budgets), f"{(kinds or ['tokens'])[0]} must each be there once"),
            (
                bool(self.factors) and self.factors[0] > 0 and ordered,
                f"factors must be above 0 and rise, not {[*self.factors]}",
            ),
            *tuning_checks(self),
            (all(decay >= 0 for decay in self.weight_decays), "weight_decays must be 0 or more"),
            (
                not self.branched or len(self.budgets) > 1,
                "branched needs several budgets: the shorter ones branch off from the longest",
            ),
        )

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets, in their own unit."""
        return self.tokens_per_parameter or self.tokens or self.flops

    @property
    def unit(self) -> str:
        """Of the budgets."""
        return "tokens per parameter" if self.tokens_per_parameter else "tokens" if self.tokens else "FLOPs"

    def tokens_of(self, config: RunConfig, budget: float) -> float:
        """Return the tokens of a budget for a size."""
        if self.tokens:
            return budget
        from jobs.study.size import size_of  # It imports torch.

        size = size_of(config)
        return budget * size.parameters if self.tokens_per_parameter else budget / size.flops_per_token

    def check(self, study: Study) -> None:
        """See the protocol.

        Raises:
            ConfigError: axes, rates or budgets with which nothing can be compared.
        """
        problems = seed_problems(study.seeds) + _axes(self, study)
        refuse_all(f"study {study.name}", problems or _lengths(Plan(self, study, {})))

    def trials(self, study: Study, done: Mapping[str, Outcome]) -> Sequence[Trial]:
        """Return the tuning of each size, and when that is done the best with each seed."""
        return [*Plan(self, study, done).trials()]

    def answer(self, study: Study, done: Mapping[str, Outcome]) -> Answer:
        """Return losses, laws and ratios, as far as they are known."""
        return answer_of(Plan(self, study, done))


def _axes(question: ScalingLaw, study: Study) -> list[str]:
    if set(study.axes) != {"size", "optimizer"}:
        there = ", ".join(study.axes) or "none"
        return [f"axes: a scaling law has `size` and `optimizer`, each with named points, not {there}"]
    if not all(isinstance(study.axes[axis], Mapping) for axis in ("size", "optimizer")):
        return ["axes: size and optimizer have named points, each with settings"]
    optimizers = points(study.axes["optimizer"], "optimizer")
    problems = []
    if len(study.axes["size"]) < 2:
        problems.append("axes.size: a law needs two sizes or more, and four to be worth its name")
    if question.reuse and question.reuse not in optimizers:
        problems.append(f"question.reuse: must be empty or one of {', '.join(optimizers)}, not {question.reuse!r}")
    problems += optimizer_problems(question, optimizers, [question.reuse] if question.reuse else optimizers)
    return problems


def _lengths(plan: Plan) -> list[str]:
    """Return what is wrong with the lengths of the trials."""
    question, problems = plan.question, []
    for size in plan.sizes:
        for optimizer in plan.optimizers:
            config, where = plan.config(size, optimizer), f"size {size}, {optimizer}"
            if config.train.stages:
                problems.append(f"{where}: train.stages have lengths of their own; a budget needs a run without them")
                continue
            short = [budget for budget in question.budgets if plan.steps(size, optimizer, budget) < LEAST_STEPS]
            if short:
                steps, tokens = plan.steps(size, optimizer, short[0]), plan.tokens_per_step(size, optimizer)
                problems.append(
                    f"{where}: a budget of {short[0]:g} {question.unit} is {steps} steps of {tokens:,} tokens, and "
                    f"{LEAST_STEPS} are needed; give more, or a smaller train.global_batch"
                )
            elif question.branched and config.optim.schedule != "wsd":
                problems.append(f"{where}: branched needs optim.schedule=wsd, not {config.optim.schedule}")
            elif question.branched and not _whole_trunk(plan, size, optimizer):
                problems.append(
                    f"{where}: the shortest budget's decay begins within the warm-up; make question.warmup less"
                )
    return problems


def _whole_trunk(plan: Plan, size: str, optimizer: str) -> bool:
    shortest = min(plan.question.budgets)
    warmup = plan.warmup_steps(size, optimizer, shortest) or plan.config(size, optimizer).optim.warmup_steps
    return plan.decay_begins(size, optimizer, shortest) > warmup
