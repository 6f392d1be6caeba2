"""Where a study is: what it asks for, knowing what is done, and what has become of that."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.study.file import StudyFile, configs_of, refuse
from jobs.study.progress import Account, Part, account
from jobs.study.question import Outcome, Trial
from jobs.study.record import Begun, StudyRecord, check_same, cost_of
from jobs.study.trial import TrialWatcher
from orchestrator.config import RunConfig
from workers.common.errors import ConfigError


@dataclass
class StudyState:
    """A study as it stands in MLflow, and what it asks for beyond that."""

    found: StudyFile
    record: StudyRecord
    places: Mapping[str, Any]
    """Settings over those of the study."""
    trials: list[Trial] = field(default_factory=list, init=False)
    """All that are known to be needed, in the order of their start."""
    configs: dict[str, RunConfig] = field(default_factory=dict, init=False)
    """By trial."""
    begun: dict[str, Begun] = field(default_factory=dict, init=False)
    """Trials that had a run when the study was read."""
    done: dict[str, Outcome] = field(default_factory=dict, init=False)
    """Of the trials that have ended."""
    _problems: dict[str, str] = field(default_factory=dict, init=False)

    def read(self) -> None:
        """Read what MLflow has, and ask; nothing is written."""
        self.begun, self.done = self.record.begun(), self.record.outcomes()
        self._problems = self._ask()

    def go_on(self, again_failed: bool = False) -> None:
        """Read it, and see that it can be begun or gone on with; what it asks for and cannot be is put down.

        Args:
            again_failed: forget that trials have failed, so that they are trained again.

        Raises:
            ConfigError: it is not the one that has begun, or something is wrong with a trial.
        """
        self.read()
        study = self.found.study
        beforehand = {trial.name for trial in study.question.trials(study, {})}
        refuse(study, {name: text for name, text in self._problems.items() if name in beforehand})
        check_same(self.begun, self.trials, self.configs)
        self.record.keep(self.found)
        if again_failed and self.record.forget_failures():
            self.read()
        self._put_down(self._problems)

    def ended(self, run_id: str) -> None:
        """Take what a trial has come to, and ask again."""
        if (outcome := self.record.outcome(run_id)) is not None:
            self.done[outcome.trial] = outcome
            self._put_down(self._ask())

    def cannot_begin(self, trial: Trial, why: str) -> None:
        """Put down a trial that cannot begin: one more answer."""
        self.ended(self.record.refuse(trial, self.found.study.name, why))

    @property
    def left(self) -> list[Trial]:
        """The trials that are not done."""
        return [trial for trial in self.trials if trial.name not in self.done]

    def account(self, running: Mapping[str, TrialWatcher] | None, slots: int) -> Account:
        """Return how far the study is.

        Args:
            running: the trials that are trained now; None: those that MLflow takes for running.
            slots: trials at a time.
        """
        parts, timed = [], []
        for trial in self.trials:
            if trial.name in self.configs:
                running_now = self._runs(trial.name) if running is None else trial.name in running
                part, seconds, share = self._part(trial, running_now, (running or {}).get(trial.name))
                parts.append(part)
                timed += [(share * part.cost.flops, seconds * part.cost.workers)] if seconds else []
        return account(parts, timed, slots)

    def _runs(self, name: str) -> bool:
        return name in self.begun and self.begun[name].status == "RUNNING"

    def _part(self, trial: Trial, runs: bool, watcher: TrialWatcher | None) -> tuple[Part, float, float]:
        """Return a trial as far as it is, seconds that were measured, and the share of its steps that they are of."""
        cost, outcome = cost_of(trial, self.configs[trial.name]), self.done.get(trial.name)
        if outcome is not None:
            part = Part(state=outcome.status, cost=cost, step=outcome.steps)
            return part, outcome.seconds, part.share
        begun = self.begun.get(trial.name)
        step = max(begun.step if begun else 0, watcher.step if watcher else 0)
        state = "running" if runs else "open" if begun else "waiting"
        part = Part(state=state, cost=cost, step=step)
        return part, watcher.seconds if watcher else 0.0, watcher.steps / cost.steps if watcher else 0.0

    def _ask(self) -> dict[str, str]:
        """Ask for the trials, knowing what is done; return what is wrong with those that are new."""
        study = self.found.study
        self.trials = [*study.question.trials(study, self.done)]
        if not self.trials:
            raise ConfigError(f"study {study.name}: question.name={study.question.name} asks for no trial at all")
        self.configs, problems = configs_of(self.found, self.trials, self.places, self.configs)
        return {name: text for name, text in problems.items() if name not in self.done}

    def _put_down(self, problems: Mapping[str, str]) -> None:
        """Put trials down that a question has come to, and that cannot be."""
        for trial in [*self.trials]:
            if trial.name in problems and trial.name not in self.done:
                self.cannot_begin(trial, problems[trial.name])
