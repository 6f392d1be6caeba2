"""Which learning rate of a small model is the best of a large one, under which rule of widths.

A sweep that telescopes over doubling widths, under each rule (`jobs.study.telescope`); beside it full grids, by which
it is judged: what they find and cost, and how far the best values move where nothing narrows the look at them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from jobs.study.fits.estimate import Estimate
from jobs.study.numbers import text_of
from jobs.study.question import Answer, Curve, Outcome, Plot, Setting, Study, Table, Trial, points
from jobs.study.sweep import BASE, HIDDEN, RATE, RULE, WIDTH, Sweep
from jobs.study.telescope import Axis, Level
from workers.common.errors import ConfigError

HOLDS = 2.0
"""The factor below which a learning rate that moves is still good at both widths."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """How the best hyper-parameters move with the width, under each rule.

    Axes of the study: `width`, points by name from the smallest on, each with a `model.hidden_size` twice that of the
    one before; `optim.width_rule`, a list; and one or two lists of values in a constant ratio, which are tuned:
    `optim.lr`, and `optim.weight_decay` or another number.
    """

    name: Literal["transfer"] = "transfer"
    """Question."""
    least_points: int = 3
    """On each tuned axis at every width: 3 shows whether the optimum is between two others; 1 is the paper's, whose
    largest width has a single run."""
    full_grids: tuple[str, ...] = ()
    """Widths at which the whole first grid is trained beside the sweep, by name; none: the largest."""
    full_grid_rules: tuple[str, ...] = ()
    """Rules for which that is done; none: all."""

    def check(self, study: Study) -> None:
        """See the protocol.

        Raises:
            ConfigError: an axis is missing or not what it has to be.
        """
        wrong = [text for text in (*_axis_problems(study), *self._key_problems(study)) if text]
        if wrong:
            raise ConfigError(f"study {study.name}: " + "; ".join(wrong))

    def _key_problems(self, study: Study) -> Iterator[str]:
        if self.least_points < 1 or self.least_points % 2 == 0:
            yield f"question.least_points must be odd, so that a grid has a centre, not {self.least_points}"
        for key, axis in (("full_grids", WIDTH), ("full_grid_rules", RULE)):
            known = points(study.axes.get(axis, {}), axis)
            if unknown := [one for one in getattr(self, key) if one not in known]:
                yield f"question.{key}: {', '.join(unknown)} is no point of axes.{axis} ({', '.join(known)})"

    def _sweeps(self, study: Study, done: Mapping[str, Outcome]) -> list[Sweep]:
        grids = self.full_grids or tuple(points(study.axes[WIDTH], WIDTH))[-1:]
        rules = points(study.axes[RULE], RULE)
        chosen = self.full_grid_rules or rules
        return [Sweep(study, rule, done, self.least_points, grids if rule in chosen else ()) for rule in rules]

    def trials(self, study: Study, done: Mapping[str, Outcome]) -> Sequence[Trial]:
        """Return all trials that are known to be needed: the sweeps' levels as far as they are, and the full grids."""
        sweeps = self._sweeps(study, done)
        found = {trial.name: trial for sweep in sweeps for trial in sweep.trials}
        return list(found.values())

    def answer(self, study: Study, done: Mapping[str, Outcome]) -> Answer:
        """Return where the best values are at each width, how far they move, and what it cost to find them."""
        sweeps = self._sweeps(study, done)
        keys = [axis.key for axis in sweeps[0].axes]
        return Answer(
            headline=_headline(sweeps),
            facts={
                "widths": sweeps[0].sizes,
                "rules": {sweep.rule: _fact(sweep) for sweep in sweeps},
            },
            tables=[_moves(sweeps, keys), *(_bests(sweeps, key) for key in keys), _levels(sweeps), _costs(sweeps)],
            plots=[*(_drifts(sweeps, key) for key in keys), *(_losses(sweep, keys[0]) for sweep in sweeps)],
            notes=_notes(self, study, sweeps),
            settings=_settings(sweeps),
            found_at={HIDDEN: sweeps[0].sizes[-1]},
        )


def _axis_problems(study: Study) -> Iterator[str]:
    for needed in (WIDTH, RULE, RATE):
        if needed not in study.axes:
            yield f"axes.{needed} is missing: a study of transfer has {WIDTH}, {RULE} and {RATE}"
    for key in study.axes.keys() - {WIDTH, RULE}:
        try:
            Axis.of(key, study.axes[key] if isinstance(study.axes[key], list | tuple) else ())
        except (TypeError, ValueError) as error:
            yield f"axes.{key} {error}"
    widths = points(study.axes.get(WIDTH, {}), WIDTH) if isinstance(study.axes.get(WIDTH, {}), Mapping) else {}
    sizes = [settings.get(HIDDEN) for settings in widths.values()]
    doubles = all(a and b == 2 * a for a, b in pairwise(sizes))
    if WIDTH in study.axes and (len(sizes) < 2 or not doubles):
        yield f"axes.{WIDTH} must be two points or more, each with twice the {HIDDEN} of the one before, not {sizes}"
    if BASE in study.settings:
        yield f"settings.{BASE} is the smallest width in this study; leave it out"


def _fact(sweep: Sweep) -> dict[str, Any]:
    """Return what goes into the JSON."""
    return {
        "complete": sweep.complete,
        "moved": {axis.key: _plain(sweep.moved(axis.key)) for axis in sweep.axes},
        "best": {
            axis.key: {
                label: {**(_plain(best.at) or {}), "loss": best.loss, "border": best.border}
                for label in sweep.labels
                if (best := sweep.bests.get((axis.key, label)))
            }
            for axis in sweep.axes
        },
        "drift": {
            axis.key: {"limit": _plain(fit.limit), "alpha": _plain(fit.alpha)}
            for axis in sweep.axes
            if (fit := sweep.drift(axis.key))
        },
        "levels": [_level_fact(sweep, level) for level in sweep.levels],
        "full_grids": [_level_fact(sweep, level) for level in sweep.grids],
    }


def _plain(found: Estimate | None) -> dict[str, float] | None:
    return found and {"value": found.value, "low": found.low, "high": found.high}


def _level_fact(sweep: Sweep, level: Level) -> dict[str, Any]:
    trials, flops, seconds = sweep.cost([level])
    return {
        "width": level.width,
        "points": len(level.asked),
        "best": level.best and sweep.values(level.best),
        "centre": level.centre and sweep.values(level.centre),
        "loss": level.best and level.losses[level.best],
        "spread": level.spread,
        "extended": level.extended,
        "border": level.border,
        "trials": trials,
        "flops": flops,
        "seconds": seconds,
    }


def _factor(moved: Estimate) -> Estimate:
    """Return by what factor something moves, whichever way; the interval begins at 1 where it may not move at all."""
    one = moved if moved.value >= 1 else moved.through(lambda value: 1 / value if value else math.inf)
    if math.isnan(one.low):
        return one
    return Estimate(one.value, max(1.0, one.low), max(one.high, 1 / one.low if one.low > 0 else math.inf))


def _headline(sweeps: Sequence[Sweep]) -> str:
    known = [(sweep, moved) for sweep in sweeps if (moved := sweep.moved(RATE))]
    first, last = sweeps[0].sizes[0], sweeps[0].sizes[-1]
    if not known:
        return f"Not known yet: no rule has a best learning rate at both widths {first} and {last}"
    known.sort(key=lambda one: abs(math.log(one[1].value)))
    told = [f"{text_of(_factor(moved))} under {sweep.rule}{_noise(moved)}" for sweep, moved in known]
    open_ = "" if all(sweep.complete for sweep in sweeps) else " (trials are left)"
    return f"From width {first} to {last} the best learning rate moves by a factor of " + ", ".join(told) + open_


def _noise(moved: Estimate) -> str:
    return " (within the noise)" if 1.0 in moved else ""


def _moves(sweeps: Sequence[Sweep], keys: Sequence[str]) -> Table:
    rows = []
    for sweep in sweeps:
        for key in keys:
            fit, moved = sweep.drift(key), sweep.moved(key)
            rows.append([sweep.rule, key, moved, fit and fit.limit, fit and fit.alpha])
    return Table(
        title="How far the best values move",
        columns=("rule", "key", "largest width's over smallest's", "at infinite width", "alpha"),
        rows=rows,
        note="The last two are of the fit ln x(n) = ln x - alpha / n (arXiv 2505.02222, equation 4).",
    )


def _bests(sweeps: Sequence[Sweep], key: str) -> Table:
    labels = sweeps[0].labels
    rows = []
    for sweep in sweeps:
        bests = [sweep.bests.get((key, label)) for label in labels]
        rows.append([sweep.rule, *(best and best.at for best in bests)])
        rows.append([f"{sweep.rule}, loss", *(best and best.loss for best in bests)])
    return Table(
        title=f"Best {key} at each width",
        columns=("rule", *labels),
        rows=rows,
        note="The minimum of a parabola in the logarithm, around the best point, of which the loss is.",
    )


def _levels(sweeps: Sequence[Sweep]) -> Table:
    rows = [
        [
            sweep.rule,
            f"{level.width}{', full grid' if level in sweep.grids else ''}",
            len(level.asked),
            " ".join(f"{axis.ratio ** float(level.spacing):.3f}" for axis in sweep.axes),
            ", ".join(f"{value:.4g}" for value in sweep.values(level.best).values()) if level.best else None,
            level.losses[level.best] if level.best else None,
            level.spread,
            "no" if not level.extended else "yes" if not level.border else "yes, and still at the border",
        ]
        for sweep in sweeps
        for level in (*sweep.levels, *sweep.grids)
    ]
    columns = ("rule", "width", "points", "ratio of neighbours", "best", "loss", "spread of losses", "extended")
    return Table(title="The sweeps", columns=columns, rows=rows)


def _costs(sweeps: Sequence[Sweep]) -> Table:
    rows = []
    for sweep in sweeps:
        largest = [level for level in sweep.grids if level.width == sweep.labels[-1]]
        for what, levels in (("telescoped", sweep.levels), ("full grid", largest)):
            trials, flops, seconds = sweep.cost(levels)
            best = levels[-1].best if levels and levels[-1].width == sweep.labels[-1] else None
            loss = levels[-1].losses[best] if best else None
            rows.append([sweep.rule, what, trials, flops / 1e12, seconds, best and sweep.values(best)[RATE], loss])
    return Table(
        title=f"What it costs to tune width {sweeps[0].labels[-1]}",
        columns=("rule", "how", "trials", "TFLOP", "seconds", RATE, "loss"),
        rows=[row for row in rows if row[2]],
        note="Operations of model and optimizer; the telescope's are those of all its widths.",
    )


def _drifts(sweeps: Sequence[Sweep], key: str) -> Plot:
    curves = []
    for sweep in sweeps:
        known = sweep.over_widths(key)
        bounded = bool(known) and all(
            math.isfinite(at.low) and at.low > 0 and math.isfinite(at.high) for _, at in known
        )
        curves.append(Curve.of(sweep.rule, [size for size, _ in known], [at for _, at in known], bounded))
    name = f"best-{key.rpartition('.')[2]}"
    return Plot(name=name, title=f"Best {key}", x="width", y=key, curves=curves, log_x=True, log_y=True)


def _losses(sweep: Sweep, key: str) -> Plot:
    number = next(number for number, axis in enumerate(sweep.axes) if axis.key == key)
    curves = []
    for label in sweep.labels:
        least: dict[float, float] = {}
        for at, loss in sweep.measured(label).items():
            value = sweep.axes[number].value(at[number])
            least[value] = min(loss, least.get(value, math.inf))
        curves.append(Curve(label=f"width {label}", x=sorted(least), y=[least[value] for value in sorted(least)]))
    title = f"Loss by {key} at each width, rule {sweep.rule}"
    return Plot(
        name=f"loss-{sweep.rule}", title=title, x=key, y="validation loss, nats per token", curves=curves, log_x=True
    )


def _notes(question: Transfer, study: Study, sweeps: Sequence[Sweep]) -> list[str]:
    tuned = " and ".join(f"{axis.key} ({axis.points} values)" for axis in sweeps[0].axes)
    notes = [
        f"Tuned under every rule, at the smallest width over a full grid: {tuned}; {len(study.seeds)} seed(s) of each.",
        "An interval needs two seeds, or more than three points around the optimum.",
        "Rates are those of the config; a rule multiplies them for each weight, and not at all at the smallest width.",
    ]
    failed = sum(one.status == "failed" for one in sweeps[0].done.values())
    if failed:
        notes.append(f"{failed} trial(s) failed, as ones whose rate is too high do; their loss counts as infinite.")
    for sweep in sweeps:
        notes += [
            f"{sweep.rule}, width {level.width}: the optimum lies at or beyond the border of a grid that was extended."
            for level in (*sweep.levels, *sweep.grids)
            if level.border
        ]
    return notes


def _settings(sweeps: Sequence[Sweep]) -> dict[str, Setting]:
    """Return those of a rule whose best rate holds over the widths: of several, the one with the lowest loss."""
    known = [(abs(math.log(moved.value)), sweep) for sweep in sweeps if (moved := sweep.moved(RATE))]
    if not known:
        return {}
    label = known[0][1].labels[-1]
    holding = [sweep for distance, sweep in known if distance < math.log(HOLDS)]
    if holding:
        sweep = min(holding, key=lambda one: one.bests[RATE, label].loss)
        why = f"the lowest loss at width {label} of the rules whose best learning rate moves by less than {HOLDS:g}"
    else:
        sweep = min(known, key=lambda one: one[0])[1]
        why = "the best learning rate moves least under it"
    found = {}
    for axis in sweep.axes:
        at = sweep.bests[axis.key, label].at
        low, high = (one if math.isfinite(one) else None for one in (at.low, at.high))
        found[axis.key] = Setting(value=float(f"{at.value:.3g}"), low=low, high=high, why=f"best at width {label}")
    found[RULE] = Setting(value=sweep.rule, why=why)
    if sweep.rule != "none":
        found[BASE] = Setting(value=sweep.sizes[0], why="the smallest width of the study")
    return found
