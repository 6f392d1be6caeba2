"""Questions of tests: one that narrows, one whose trials branch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.study.question import Answer, Branch, Outcome, Study, Trial, trial_name


def asked(study: Study, settings: Mapping[str, Any], seed: int = 0, **own: Any) -> Trial:
    coordinates = {**settings, "seed": seed}
    return Trial(name=trial_name(**coordinates), settings=settings, coordinates=coordinates, seed=seed, **own)


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """The best rate of the axis, and then twice and half of it."""

    name: str = "narrowing"

    def check(self, study: Study) -> None:
        pass

    def trials(self, study: Study, done: Mapping[str, Outcome]) -> Sequence[Trial]:
        first = [asked(study, {"optim.lr": rate}, seed) for rate in study.axes["optim.lr"] for seed in study.seeds]
        known = [done[trial.name] for trial in first if trial.name in done]
        if len(known) < len(first):
            return first
        usable = [one for one in known if one.val_loss is not None]
        if not usable:
            return first
        best = min(usable, key=lambda one: (one.val_loss, one.trial)).coordinates["optim.lr"]
        more = [asked(study, {"optim.lr": rate}, study.seeds[0]) for rate in (best / 2, best * 2)]
        return [*first, *(one for one in more if one.name not in {trial.name for trial in first})]

    def answer(self, study: Study, done: Mapping[str, Outcome]) -> Answer:
        losses = {name: one.val_loss for name, one in done.items()}
        return Answer(headline=f"{len(losses)} losses", facts={"losses": losses})


@dataclass(frozen=True, kw_only=True)
class Branching:
    """A long trial, one that is cut short, and branches of it."""

    name: str = "branching"
    steps: tuple[int, ...] = (4,)
    parent: str = "long"
    stop_at: int = 0

    def check(self, study: Study) -> None:
        pass

    def trials(self, study: Study, done: Mapping[str, Outcome]) -> Sequence[Trial]:
        long = Trial(name="long", settings={}, coordinates={"trial": "long"})
        cut = Trial(name="cut", settings={}, coordinates={"trial": "cut"}, stop_at=self.stop_at)
        branches = [
            Trial(
                name=f"from-{step}",
                settings={"optim.lr": 1e-3},
                coordinates={"trial": "branch", "step": step},
                branch=Branch(trial=self.parent, step=step),
            )
            for step in self.steps
        ]
        return [*branches, long, *([cut] if self.stop_at else [])]

    def answer(self, study: Study, done: Mapping[str, Outcome]) -> Answer:
        return Answer(headline="done", facts={})
