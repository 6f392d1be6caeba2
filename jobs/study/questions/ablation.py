"""What each of several variants does to the loss against a base: paired differences within each seed, with intervals.

Runs of one seed begin with the same weights and see the same text in the same order, so what they differ by is the
variant and the noise of training; what a seed does to all alike is not in it. The intervals of all variants hold
together, with 95 % in all: of twenty variants that do nothing one would look like a finding otherwise.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jobs.study.combinations import (
    Combination,
    binned,
    check_axes,
    combinations,
    mean_cost,
    mean_series,
    usable,
)
from jobs.study.fits.estimate import Estimate
from jobs.study.numbers import LEAST_VALUES, mean_of, outside, text_of
from jobs.study.question import Answer, Curve, Outcome, Plot, Setting, Study, Table, Trial
from workers.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Variants against a base; the first point of each axis is the base."""

    name: Literal["ablation"] = "ablation"
    """Question."""

    def check(self, study: Study) -> None:
        """See the protocol.

        Raises:
            ConfigError: there is nothing to compare.
        """
        check_axes(study)
        if len(combinations(study)) < 2:
            raise ConfigError(
                f"study {study.name}: an ablation compares points of its axes with the first, and axes has "
                f"{len(study.axes)} with one point in all; name two points or more"
            )

    def trials(self, study: Study, done: Mapping[str, Outcome]) -> Sequence[Trial]:
        """Return every combination with every seed: all of a seed together, so that an early look can compare."""
        return [one.trial(seed) for seed in study.seeds for one in combinations(study)]

    def answer(self, study: Study, done: Mapping[str, Outcome]) -> Answer:
        """Return the differences of all variants to the base."""
        base, *others = (Variant(one, study.seeds, done) for one in combinations(study))
        compared = [Compared(one, base, len(others)) for one in others]
        return Answer(
            headline=_headline(base, compared),
            facts={"base": base.fact(), "variants": {one.label: one.fact() for one in compared}},
            tables=[_losses(base, compared), *_along(base, compared), _costs([base, *others])],
            plots=_plots(base, compared),
            notes=_notes(study, base, compared),
            settings=_settings(compared),
        )


class Variant:
    """A combination with what its trials have come to."""

    def __init__(self, combination: Combination, seeds: Sequence[int], done: Mapping[str, Outcome]) -> None:
        self.combination, self.label = combination, combination.label
        names = {seed: combination.trial(seed).name for seed in seeds}
        self.outcomes = {seed: done[name] for seed, name in names.items() if name in done}
        self.usable = {seed: one for seed, one in self.outcomes.items() if usable(one)}
        self.failed = [seed for seed in self.outcomes if seed not in self.usable]

    @property
    def losses(self) -> dict[int, float]:
        """Validation loss by seed."""
        return {seed: one.val_loss for seed, one in self.usable.items() if one.val_loss is not None}

    def fact(self) -> dict[str, Any]:
        """Return what goes into the JSON."""
        return {"label": self.label, "val_loss": {str(k): v for k, v in self.losses.items()}, "failed": self.failed}


class Compared:
    """A variant beside the base, within the seeds that both have."""

    def __init__(self, variant: Variant, base: Variant, number: int) -> None:
        self.variant, self.base, self.number, self.label = variant, base, number, variant.label
        self.seeds = sorted(variant.usable.keys() & base.usable.keys())
        self.differences = [variant.losses[seed] - base.losses[seed] for seed in self.seeds]

    @cached_property
    def mean(self) -> Estimate | None:
        """Of the differences at the end; None where no seed has both."""
        return mean_of(self.differences, self.number) if self.differences else None

    @property
    def told(self) -> bool:
        """Whether there are seeds enough for an interval."""
        return len(self.seeds) >= LEAST_VALUES

    @property
    def found(self) -> bool:
        """Whether it differs from the base by more than noise."""
        return self.mean is not None and outside(self.mean)

    @cached_property
    def along(self) -> list[tuple[int, Estimate]]:
        """Differences of the validations at each step at which all had one."""
        pairs = []
        for seed in self.seeds:
            mine, its = dict(self.variant.usable[seed].validation), dict(self.base.usable[seed].validation)
            pairs.append([(step, mine[step] - its[step]) for step in sorted(mine.keys() & its.keys())])
        return [(step, mean_of(values, self.number)) for step, values in mean_series(pairs)]

    def fact(self) -> dict[str, Any]:
        """Return what goes into the JSON."""
        along = [{"step": step, "difference": one.value, "low": one.low, "high": one.high} for step, one in self.along]
        mean = self.mean and {"value": self.mean.value, "low": self.mean.low, "high": self.mean.high}
        return {
            **self.variant.fact(),
            "seeds": self.seeds,
            "differences": self.differences,
            "difference": mean,
            "outside_the_noise": self.found,
            "along": along,
        }


def _headline(base: Variant, compared: Sequence[Compared]) -> str:
    """Say first what differs, then that the rest is noise, then what nobody can tell."""
    known = [one for one in compared if one.mean is not None]
    if not known:
        return f"Nothing to compare yet: no seed has both a variant and the base {base.label}"
    told = [one for one in known if one.told]
    failed = sum(len(one.failed) for one in (base, *(one.variant for one in compared)))
    ending = f"; {failed} trial(s) failed" if failed else ""
    if not told:
        few = f"No interval with fewer than {LEAST_VALUES} seeds"
        return f"{few}: no difference to {base.label} can be told from noise{ending}"
    if unknown := len(compared) - len(told):
        ending = f"; {unknown} with fewer than {LEAST_VALUES} seeds cannot be told{ending}"
    fewest, most = (pick(len(one.seeds) for one in told) for pick in (min, max))
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    found = sorted((one for one in told if one.found), key=lambda one: one.mean.value if one.mean else 0.0)
    if not found:
        which = told[0].label if len(told) == 1 else f"{len(told)} variants"
        return f"Within the noise: {which} against {base.label}, validation loss, {seeds}{ending}"
    differ = "; ".join(f"{one.label} {text_of(one.mean, '+')}" for one in found)
    noise = f"; {len(told) - len(found)} within the noise" if len(told) > len(found) else ""
    return f"Loss against {base.label}, nats per token, {seeds}: {differ}{noise}{ending}"


def _losses(base: Variant, compared: Sequence[Compared]) -> Table:
    rows: list[list[Any]] = [[base.label, *_spread(base), "the base", "-"]]
    for one in compared:
        verdict = ("yes" if one.found else "within the noise") if one.told else "too few seeds"
        difference = None if one.mean is None else text_of(one.mean, "+")
        rows.append([one.label, *_spread(one.variant), difference, verdict])
    return Table(
        title="Validation loss at the end",
        columns=["variant", "seeds", "failed", "loss, mean", "standard deviation", "difference, same seeds", "differs"],
        rows=rows,
        note=f"Nats per token. Intervals: 95 % for all {len(compared)} variant(s) together, by Student's t over the "
        "paired differences (Bonferroni).",
    )


def _spread(variant: Variant) -> list[Any]:
    losses = list(variant.losses.values())
    deviation = f"{statistics.stdev(losses):.2g}" if len(losses) > 1 else None
    mean = f"{statistics.fmean(losses):.4f}" if losses else None
    return [len(losses), len(variant.failed), mean, deviation]


def _along(base: Variant, compared: Sequence[Compared]) -> list[Table]:
    """Return the differences at a few points of the run, where there are validations on the way."""
    steps = sorted({step for one in compared for step, _ in one.along} - {0})
    if len(steps) < 2:
        return []
    shown = sorted({steps[round(share * (len(steps) - 1) / 4)] for share in range(5)})
    rows = []
    for one in compared:
        known = dict(one.along)
        rows.append([one.label, *(text_of(known[step], "+") if step in known else None for step in shown)])
    return [
        Table(
            title=f"Difference to {base.label} along the run",
            columns=["variant", *(f"step {step:,}" for step in shown)],
            rows=rows,
            note="Intervals hold for all variants together at a step, not for all steps. Only the end of a schedule "
            "compares what a run is good for: while the learning rate is high, orders turn round.",
        )
    ]


def _costs(variants: Sequence[Variant]) -> Table:
    rows = []
    for one in variants:
        finished = list(one.usable.values())
        model, optimizer = mean_cost(finished, "flops"), mean_cost(finished, "optimizer_flops")
        share = None if not model or optimizer is None else f"{optimizer / model:.2%}"
        rows.append([one.label, mean_cost(finished, "seconds"), model, share])
    return Table(
        title="Cost of a run",
        columns=["variant", "seconds in steps", "FLOPs of the model", "of the optimizer, beside them"],
        rows=rows,
        note="Means over the seeds. Seconds are of this machine, with whatever ran beside.",
    )


def _plots(base: Variant, compared: Sequence[Compared]) -> list[Plot]:
    losses = [_curve(one) for one in (base, *(one.variant for one in compared))]
    plots = [
        Plot(
            name="losses",
            title="Training loss",
            x="step",
            y="loss (nats per token)",
            curves=[curve for curve in losses if curve.x],
            note="Means over the seeds that finished, each point over a stretch of steps.",
        )
    ]
    along = [
        Curve.of(one.label, [step for step, _ in one.along], [estimate for _, estimate in one.along])
        for one in compared
        if len(one.along) > 1
    ]
    if along:
        label = f"validation loss minus that of {base.label} (nats)"
        plots.append(Plot(name="differences", title="Paired differences", x="step", y=label, curves=along, marks=[0]))
    ends = {one.label: one.mean for one in compared if one.mean is not None}
    by_number = Curve.of("at the end", list(range(1, len(ends) + 1)), [*ends.values()], kind="points")
    label = f"loss minus that of {base.label} (nats)"
    ending = Plot(name="ends", title="At the end", x="", y=label, curves=[by_number], marks=[0], names=[*ends])
    return [*plots, ending] if ends else plots


def _curve(variant: Variant) -> Curve:
    means = list(mean_series(binned(one.losses) for one in variant.usable.values()))
    return Curve(
        label=variant.label,
        x=[step for step, _ in means],
        y=[statistics.fmean(values) for _, values in means],
        kind="line",
    )


def _notes(study: Study, base: Variant, compared: Sequence[Compared]) -> list[str]:
    notes = [
        f"Nothing was tuned: every variant has the learning rate and all else of {base.label} but for its own "
        "settings. A variant may do better at a rate of its own.",
        f"Each variant has {len(study.seeds)} seed(s); differences are within a seed, whose runs begin with the same "
        "weights and see the same text.",
    ]
    if len(study.seeds) < LEAST_VALUES:
        notes.append(f"With fewer than {LEAST_VALUES} seeds there is no interval: nothing here can be told from noise.")
    notes += [
        f"{one.label} failed with seed(s) {', '.join(map(str, one.failed))}: {_first_error(one)}"
        for one in (base, *(one.variant for one in compared))
        if one.failed
    ]
    notes += [
        f"{one.label} is compared in {len(one.seeds)} of {len(study.seeds)} seeds: those that went well."
        for one in compared
        if one.seeds and len(one.seeds) < len(study.seeds)
    ]
    for name in ("tokens", "parameters"):
        its = mean_cost([*base.usable.values()], name)
        other = [one.label for one in compared if mean_cost([*one.variant.usable.values()], name) not in (its, None)]
        if its is not None and other:
            notes.append(
                f"Another number of {name} than {base.label}: {', '.join(other)}. That is in the difference, too."
            )
    return notes


def _first_error(variant: Variant) -> str:
    return next((one.error for one in variant.outcomes.values() if not usable(one) and one.error), "no finite loss")


def _settings(compared: Sequence[Compared]) -> dict[str, Setting]:
    """Return the settings of the variant that is better than the base beyond the noise, if one is."""
    better = [one for one in compared if one.found and one.mean and one.mean.value < 0 and not one.variant.failed]
    if not better:
        return {}
    best = min(better, key=lambda one: one.mean.value if one.mean else 0.0)
    beside = len(better) - 1
    others = f"; {beside} other variant(s) are better than the base, too" if beside else ""
    why = f"{best.label}: {text_of(best.mean, '+')} nats to {best.base.label}, {len(best.seeds)} seeds{others}"
    return {key: Setting(value=value, why=why) for key, value in best.variant.combination.settings.items()}
