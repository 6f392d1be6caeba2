"""Which trial of a study begins next: pure functions of what was asked for and what has become of it."""

from collections.abc import Callable, Collection, Mapping, Sequence

from jobs.study.question import Outcome, Trial


def next_trial(
    trials: Sequence[Trial],
    done: Mapping[str, Outcome],
    taken: Collection[str],
    has_step: Callable[[str, int], bool],
) -> Trial | None:
    """Return the trial that may begin now, the first in their order; None where all wait, run or are done.

    Args:
        trials: that the study asks for.
        done: what those that have ended have come to.
        taken: names of those that are running, or were given up for now.
        has_step: tells whether a trial, which need not be done, has a checkpoint of a step.
    """
    for trial in trials:
        if trial.name in done or trial.name in taken:
            continue
        if trial.branch is None or has_step(trial.branch.trial, trial.branch.step):
            return trial
    return None


def orphan(trials: Sequence[Trial], done: Mapping[str, Outcome]) -> tuple[Trial, str] | None:
    """Return a trial that can never begin, as what it branches from has failed, and why; None where there is none."""
    for trial in trials:
        if trial.branch is not None and trial.name not in done:
            parent = done.get(trial.branch.trial)
            if parent is not None and parent.status == "failed":
                return trial, f"{parent.trial}, from which it branches, has failed: {parent.error}"
    return None


def branch_steps(trials: Sequence[Trial], name: str) -> dict[int, list[str]]:
    """Return the names of those that branch off a trial, by step."""
    found: dict[int, list[str]] = {}
    for trial in trials:
        if trial.branch is not None and trial.branch.trial == name:
            found.setdefault(trial.branch.step, []).append(trial.name)
    return dict(sorted(found.items()))
