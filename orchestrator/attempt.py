"""One driver's attempt at a run: it takes the run over, leads it to its end, and says what that came to.

Whatever an attempt needs hangs on it and on what it is given: nothing here is global to the process, so that several
runs can be led at the same time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from orchestrator.config import RunConfig, task_of
from orchestrator.controller import Controller
from orchestrator.generation import Decide, plainly
from orchestrator.group.pool import Pool
from orchestrator.identity import check_identity, identity
from orchestrator.living import BranchPoint, Living
from orchestrator.log.commits import Commits
from orchestrator.log.lease import Lease
from orchestrator.log.retention import Janitor
from orchestrator.log.run_log import FencedError, RunLog
from orchestrator.preflight import Inputs
from orchestrator.record.journal import Journal
from orchestrator.record.progress import Progress, Recorder
from orchestrator.record.provenance import code_of
from orchestrator.record.result import RunResult
from orchestrator.stop import StopSignal
from orchestrator.stretch import Stretch
from workers.checkpoint.lineage import Lineage, descend, go_on
from workers.checkpoint.manifest import Manifest
from workers.data.json_tokenizer import copy_tokenizer
from workers.task import Origin, Task

Begin = Callable[[Journal, Task], Recorder]
"""Makes the recorder of an attempt, from its journal and from what is going to be trained."""


@dataclass
class Attempt:
    """A run that this driver leads; `open` takes it over."""

    config: RunConfig
    lease: Lease
    """The right to lead it."""
    log: RunLog
    identity: dict[str, Any]
    """What every later attempt must share."""
    task: Task
    """What is trained; its manifest is where to go on from, its `attempt` which take-over of the run this is."""
    recorder: Recorder
    """Is told everything."""
    progress: Progress
    controller: Controller = field(init=False)
    """Leads the training, once that has begun."""
    status: str = field(default="failed", init=False)

    @classmethod
    def open(
        cls,
        config: RunConfig,
        inputs: Inputs,
        lease: Lease,
        begin: Begin,
        warn: Callable[[str], object],
        log: RunLog | None = None,
        origin: Origin | None = None,
        stretch: Stretch | None = None,
        until: int = 0,
    ) -> "Attempt":
        """Take a run over, or begin it.

        Args:
            config: of the run.
            inputs: what it is made of besides.
            lease: on the run's folder.
            begin: makes the recorder.
            warn: told of what is damaged.
            log: of the run, where it was read before.
            origin: the weights that a new run begins with.
            stretch: what to train once more of another run.
            until: the step after which the run ends, though its schedule goes on; 0: the last.

        Raises:
            ConfigError: this config would make another run of it.
            FencedError: another driver has taken it over.
            StorageError: its log cannot be read or written, or no checkpoint of it is whole.
        """
        log = log or RunLog(lease.store)
        log.guard = lease.check
        log.refresh()  # Since it was read another driver may have come and gone.
        same = identity(config, inputs.corpora)
        if log.identity is not None:
            check_identity(log, same)
        manifest, manifest_url = log.newest_good(), ""
        if manifest is None and stretch is not None:
            manifest, manifest_url = stretch.manifest, stretch.run_url
        elif manifest is None and origin is not None and config.train.init_state == "run":
            manifest, manifest_url, origin = origin.manifest, origin.run_url, None
        for text in log.damaged:
            warn(f"{text}; it does not count")
        for corpus in inputs.corpora:
            copy_tokenizer(corpus.store, log.store, corpus.tokenizer_files)
        number = log.take_over(same, inputs.warning)
        task = task_of(config, inputs.corpora, log.store.url, number, manifest, origin)
        last_step = stretch.last_step if stretch else until or config.train.steps
        task = replace(task, manifest_url=manifest_url, until=last_step)
        recorder = begin(Journal(log.store, number), task)
        progress = Progress(seen=recorder.marks["train"])
        if manifest:
            progress.step = progress.committed = manifest.step
            progress.tokens = manifest.counters["tokens"]
            progress.validated = min(recorder.marks["validation"], manifest.step)
        return cls(config, lease, log, same, task, recorder, progress)

    def train(
        self,
        pool: Pool,
        stop: StopSignal,
        kill_after: int | None = None,
        decide: Decide = plainly,
        living: Living | None = None,
        branch: BranchPoint | None = None,
    ) -> None:
        """Lead the run with the pool's workers until its last step, or until a stop.

        Args:
            pool: the processes; they may still be starting.
            stop: tells when a person wants it to end.
            kill_after: for demonstrations: SIGKILL one worker after this step.
            decide: decides what is automatic, for each number of workers.
            living: where its branches begin.
            branch: where it begins itself, if that is in a living run.

        Raises:
            RaymuonError: with the exit code of what went wrong.
        """
        commits = Commits(
            self.log,
            self.task.attempt,
            self.identity,
            self.task.manifest,
            self.recorder.before_commit,
            partial(lineage_of, self.task),
        )
        with Janitor(self.log, self.config.checkpoint, commits.bad, self.recorder.notice, self._kept_steps) as janitor:
            commits.after = partial(self._committed, janitor, living)
            self.controller = Controller(
                self.config,
                pool,
                commits,
                self.task,
                self.progress,
                self.recorder,
                self.lease,
                stop,
                kill_after,
                decide,
                branch,
            )
            if living is not None:
                living.begin(pool, self.task.manifest.step if self.task.manifest else 0)
            try:
                with stop.during_training():
                    self.status = self.controller.run()
            except FencedError:
                raise  # The record is another driver's from here on.
            except BaseException:
                self.recorder.close(time.monotonic())
                raise
            finally:
                if living is not None:
                    living.end()
            self.recorder.close(time.monotonic())

    @property
    def _kept_steps(self) -> tuple[int, ...]:
        """Steps whose checkpoints are always kept: those that are asked for, and the last ones of stages."""
        train = self.config.train
        return (*self.config.checkpoint.at, *(train.ends if train.stages else ()))

    def _committed(self, janitor: Janitor, living: Living | None, manifest: Manifest) -> None:
        janitor.wake()
        if living is not None and (held := living.committed(self.log.store.url, manifest)):
            what = f"step {manifest.step}: {held / 1e6:.1f} MB of it stay in the keepers' memory"
            self.recorder.notice(f"{what} until its branches have begun")

    def result(self) -> RunResult:
        """Return what the run has come to."""
        tally = self.recorder.tally
        result = RunResult(
            self.log.run_id,
            status=self.status,
            steps=self.controller.ended_at,
            tokens=self.progress.tokens,
            world_size=self.progress.world_size,
            recoveries=len(tally.faults),
            changes=[change for change in tally.recoveries if change.reason != "start"],
            goodput=tally.goodput(time.monotonic()),
            mttr_s=tally.mean_time_to_recovery(),
        )
        self.recorder.complete(result)
        return result


def lineage_of(task: Task, step: int) -> Lineage:
    """Return what the checkpoint of a step comes from, of an attempt that goes on as the task says."""
    code, manifest, origin = code_of(), task.manifest, task.origin
    if manifest is not None and not task.manifest_url:
        found = go_on(code, manifest)
    elif manifest is not None:  # The replayed run's, or a branch's parent's.
        found = descend(code, manifest, task.manifest_url)
    else:
        found = descend(code, origin.manifest, origin.run_url) if origin else descend(code)
    return replace(found, stage=task.recipe.at(step).name)
