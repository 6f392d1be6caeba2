"""What a report tells of the trials: every one as a row, how many there were of what, and what they have cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.study.numbers import text_of
from jobs.study.question import Answer, Outcome, Study, Table, Trial

PENDING = "not done"


@dataclass(frozen=True)
class Row:
    """A trial with what it has come to, if it has."""

    trial: Trial
    outcome: Outcome | None
    link: str
    """Of its run; the run's id where nothing shows it; empty where there is no run."""
    share: float
    """Of the outcome's tokens that are its own, and not those of the trial from which it branched."""

    @property
    def status(self) -> str:
        """Of the trial."""
        return self.outcome.status if self.outcome else PENDING


def rows_of(study: Study, outcomes: Mapping[str, Outcome], links: Mapping[str, str]) -> list[Row]:
    """Return a row for every trial that the question asks for, in that order, and for every other that there is."""
    trials = {trial.name: trial for trial in study.question.trials(study, outcomes)}
    for name in sorted(outcomes.keys() - trials.keys()):  # Of an older version of the question; it cost something, too.
        trials[name] = Trial(name=name, settings={}, coordinates=outcomes[name].coordinates)
    rows = []
    for name, trial in trials.items():
        outcome = outcomes.get(name)
        link = links.get(name) or (outcome.run_id if outcome else "")
        rows.append(Row(trial, outcome, link, _own_share(trial, outcome, outcomes)))
    return rows


def _own_share(trial: Trial, outcome: Outcome | None, outcomes: Mapping[str, Outcome]) -> float:
    """Return the share of a trial's tokens that it was trained on itself.

    Of its parent's tokens it has those to the step of the branch: as many in each step, for a parent whose batch grows
    that is about right.
    """
    if outcome is None or trial.branch is None or not outcome.tokens:
        return 1.0
    parent = outcomes.get(trial.branch.trial)
    if parent is None or not parent.steps:
        return max(0.0, 1 - trial.branch.step / outcome.steps) if outcome.steps else 1.0
    inherited = parent.tokens * trial.branch.step / parent.steps
    return min(1.0, max(0.0, 1 - inherited / outcome.tokens))


def headline(answer: Answer, rows: Sequence[Row]) -> str:
    """Return the first line of a report: while trials are missing that there are, and then the answer so far."""
    waiting = sum(row.outcome is None for row in rows)
    return f"Not finished, {waiting} of {len(rows)} trials to go. {answer.headline}" if waiting else answer.headline


def axes_of(rows: Sequence[Row]) -> list[str]:
    """Return the axes that any trial is on, in the order of their appearance."""
    return list(dict.fromkeys(axis for row in rows for axis in row.trial.coordinates))


def tuned(rows: Sequence[Row]) -> Table:
    """Return how many trials there were at each point of each axis: whether all had the same effort."""
    counts: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        for axis, point in row.trial.coordinates.items():
            counts.setdefault((axis, point), []).append(row)
    axes = axes_of(rows)
    columns = ["axis", "point", "trials", "finished", "failed", PENDING]
    states = ("finished", "failed", PENDING)
    found = [
        [axis, point, len(of), *(sum(row.status == state for row in of) for state in states)]
        for (axis, point), of in sorted(counts.items(), key=lambda one: axes.index(one[0][0]))
    ]
    return Table(title="What was tuned, and how often", columns=columns, rows=found)


def costs(rows: Sequence[Row]) -> Table:
    """Return what all trials have cost: a branch only what it has cost itself."""
    done = [(row.outcome, row.share) for row in rows if row.outcome]
    states = [sum(row.status == state for row in rows) for state in ("finished", "failed", PENDING)]
    found = [
        ["trials finished, failed, not done", ", ".join(map(str, states))],
        ["tokens", float(sum(one.tokens * share for one, share in done))],
        ["FLOPs of the models", sum(one.flops * share for one, share in done)],
        ["FLOPs of the optimizers, beside them", sum(one.optimizer_flops * share for one, share in done)],
        ["hours in steps", sum(one.seconds for one, _ in done) / 3600],
    ]
    return Table(
        title="Cost",
        columns=["", "in all"],
        rows=found,
        note="What a trial has from the one that it branched from is counted once. Hours are those in steps that "
        "count, as if trials had run one after another: without starts, validations and what faults have cost.",
    )


def cells(row: Row, axes: Sequence[str]) -> list[Any]:
    """Return what a table of trials has of one: name, point of each axis, status, figures."""
    one = row.outcome
    points = [row.trial.coordinates.get(axis) for axis in axes]
    if one is None:
        return [row.trial.name, *points, PENDING, *[None] * (len(FIGURES) + 1)]
    return [row.trial.name, *points, one.status, *(getattr(one, name) for name in FIGURES), one.error or None]


def texts(row: Row, axes: Sequence[str]) -> list[str]:
    """Return the same for people; a loss of one run has no interval, and four decimal places."""
    found = cells(row, axes)
    at = 2 + len(axes)
    told = list(map(text_of, found))
    if isinstance(found[at], float) and math.isfinite(found[at]):
        told[at] = f"{found[at]:.4f}"
    return told


FIGURES = ("val_loss", "steps", "tokens", "parameters", "flops", "optimizer_flops", "seconds")
"""Of an outcome, in a table of trials."""
