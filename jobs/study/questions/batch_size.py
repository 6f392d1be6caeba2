"""How the batch changes what an optimizer needs: token ratio, token-optimal and critical batch, the schedule of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jobs.build import refuse_all
from jobs.study.batches.answer import answer_of
from jobs.study.batches.plan import AXES, Plan
from jobs.study.fits.batch import EPSILON, TOLERANCE
from jobs.study.question import Answer, Outcome, Study, Trial, points
from jobs.study.tuning import LEAST_STEPS, optimizer_problems, seed_problems, tuning_checks
from optim.checks import require, within


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """Batches times optimizers, as docs/batch-size.md says."""

    name: Literal["batch-size"] = "batch-size"
    """Question."""
    tokens: float
    """Of each run, at every batch."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate of each optimizer at the batch `rate_batch`, by its name on the axis `optimizer`."""
    rate_batch: int = 0
    """Sequences of the batch at which the rates hold; 0: the smallest."""
    rate_exponent: float = 0.5
    """A batch of k times the size has k to this power times the rate; 0.5: the root."""
    factors: tuple[float, ...] = (1.0,)
    """Times that rate: the grid of each optimizer at each batch."""
    extend: int = 0
    """Rounds by which a grid grows at most where its best is at an end; each optimizer then gets one more trial."""
    warmup: float = 0.02
    """Share of the steps in which the rate rises; 0: optim.warmup_steps as it is."""
    losses: Literal["validation", "training"] = "validation"
    """Of which loss the tokens until a loss are taken: the validations', or the training's, smoothed."""
    validations: int = 40
    """Of a run; 0: train.validate_every as it is."""
    smoothing: float = 0.95
    """Training losses: what is left of their average after a thousandth of the tokens."""
    levels: int = 4
    """Losses at which batches are compared, between those that all runs come to."""
    targets: tuple[float, ...] = ()
    """These losses instead, in nats per token; a batch that never comes to one has no tokens there."""
    tolerance: float = TOLERANCE
    """Tokens above the fewest that count as the fewest."""
    devices: tuple[int, ...] = ()
    """Numbers of devices for which the time until the lowest loss is simulated; empty: none."""
    gpu_type: str = "H100"
    """Of these devices, by its data sheet."""
    branch_at: tuple[float, ...] = ()
    """Tokens after which branches go off the smallest batch's run; needs optim.schedule=constant. Empty: none."""
    branch_tokens: float = 0.0
    """Of each branch."""
    branch_factors: tuple[int, ...] = (1, 2, 4, 8)
    """Times the smallest batch; the rate is multiplied by their root."""
    epsilon: float = EPSILON
    """Nats by which a branch's loss may lie above the best of the smaller ones."""
    baseline: str = "adamw"
    """The optimizer whose tokens are divided by those of the others."""

    def __post_init__(self) -> None:
        rising = all(one < other for one, other in zip(self.branch_factors, self.branch_factors[1:], strict=False))
        require(
            self,
            *within(self, "(0, inf)", "tokens"),
            *within(self, "[0, inf)", "rate_batch", lowest="the smallest"),
            *within(self, "[0, 2]", "rate_exponent"),
            (bool(self.factors) and min(self.factors) > 0, f"factors must be above 0, not {[*self.factors]}"),
            *tuning_checks(self),
            *within(self, "[0, inf)", "validations", lowest="as the config has it"),
            *within(self, "[0, 1)", "smoothing"),
            *within(self, "[1, 20]", "levels"),
            *within(self, "[0, 1]", "tolerance"),
            *within(self, "[0, inf)", "epsilon"),
            (all(loss > 0 for loss in self.targets), "targets must all be above 0"),
            (all(count > 0 for count in self.devices), "devices must all be above 0"),
            (all(0 < at < self.tokens for at in self.branch_at), "branch_at must lie between 0 and tokens"),
            (not self.branch_at or self.branch_tokens > 0, "branch_tokens must be above 0 where there is branch_at"),
            (
                rising and self.branch_factors[:1] == (1,) and len(self.branch_factors) > 1,
                f"branch_factors must begin with 1 and rise, not {[*self.branch_factors]}",
            ),
        )

    def check(self, study: Study) -> None:
        """See the protocol.

        Raises:
            ConfigError: axes, rates or lengths with which nothing can be compared.
        """
        problems = [*seed_problems(study.seeds), *_axes(self, study)]
        refuse_all(f"study {study.name}", problems or [*_lengths(Plan(self, study, {}))])

    def trials(self, study: Study, done: Mapping[str, Outcome]) -> Sequence[Trial]:
        """Return the tuning of each batch, when that is done the best with each seed, and the branches."""
        return [*Plan(self, study, done).trials()]

    def answer(self, study: Study, done: Mapping[str, Outcome]) -> Answer:
        """Return ratios and critical batches, as far as they are known."""
        return answer_of(Plan(self, study, done))


def _axes(question: BatchSize, study: Study) -> Iterator[str]:
    axes = [name for name in AXES if name in study.axes]
    if {*study.axes} != {*axes, "optimizer"} or len(axes) != 1:
        there = ", ".join(study.axes) or "none"
        yield f"axes: must be `optimizer` and `batch` (named points) or `train.global_batch` (a list), not {there}"
        return
    batches, optimizers = (points(study.axes[axis], axis) for axis in (axes[0], "optimizer"))
    sizes = [settings.get("train.global_batch") for settings in batches.values()]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        yield f"axes.{axes[0]}: each point needs train.global_batch, a whole number of sequences"
    if len({*sizes}) < max(2, len(sizes)):
        yield f"axes.{axes[0]}: needs two batches or more, each of another size"
    yield from optimizer_problems(question, optimizers, optimizers)


def _lengths(plan: Plan) -> Iterator[str]:
    """Yield what is wrong with the lengths of the trials."""
    question = plan.question
    for optimizer in plan.optimizers:
        for batch in plan.batches:
            config, where = plan.config(optimizer, batch), f"batch {batch}, {optimizer}"
            if config.train.stages:
                yield f"{where}: train.stages have lengths of their own; this needs a run without them"
            elif (steps := plan.steps(optimizer, batch)) < LEAST_STEPS:
                yield (
                    f"{where}: question.tokens={question.tokens:g} are {steps} steps of "
                    f"{plan.tokens_per_step(optimizer, batch):,} tokens, and {LEAST_STEPS} are needed"
                )
            elif question.branch_at and config.optim.schedule != "constant":
                yield f"{where}: branches need optim.schedule=constant, not {config.optim.schedule}"
        yield from _branch_lengths(plan, optimizer)


def _branch_lengths(plan: Plan, optimizer: str) -> Iterator[str]:
    trunk = plan.steps(optimizer, plan.smallest)
    for fork in plan.forks:
        where = f"{optimizer}, branch_at={fork.tokens:g}, factor {fork.factor}"
        if not 1 <= plan.fork_step(optimizer, fork) <= trunk:
            yield f"{where}: is not within the {trunk} steps of the smallest batch's run"
        if (steps := plan.branch_steps(optimizer, fork)) < 1:
            yield f"{where}: branch_tokens={plan.question.branch_tokens:g} are {steps} steps"
