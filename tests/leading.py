"""A run without Ray: the real controller, members, keepers and storage, over plain processes."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from optim.config import OptimConfig
from orchestrator.attempt import Attempt
from orchestrator.config import RecoveryConfig, RunConfig, ScalingConfig
from orchestrator.controller import Controller
from orchestrator.group.handles import Cluster
from orchestrator.group.keeper import new_token
from orchestrator.group.pool import Pool
from orchestrator.living import BranchPoint, Living
from orchestrator.log.lease import Lease
from orchestrator.log.run_log import RunLog
from orchestrator.origin import beginning
from orchestrator.preflight import Inputs
from orchestrator.record.events import Event, Fault, Membership, Recovery, Tally
from orchestrator.record.metrics import NodeUsage
from orchestrator.record.result import RunResult
from orchestrator.stop import StopSignal
from tests.closeness import ADAMW_EPS
from tests.workers.test_loop import TEXT
from tests.workers.test_moonlight import TINY
from workers.checkpoint.manifest import Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.common.storage import Store
from workers.config import CheckpointConfig
from workers.data.config import DataConfig
from workers.data.prepare import prepare
from workers.recipe import TrainConfig
from workers.reports import Report, StepDone, Validated


def config_of(folder: Path, *, recovery: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    train = {"steps": 30, "global_batch": 12, "micro_batch": 2, "seq_len": 32, "validate_sequences": 4}
    train |= {"validate_every": 0, "sample_prompt": ""}
    config = RunConfig(
        model=TINY,
        optim=OptimConfig(lr=1e-2, eps=ADAMW_EPS),
        data=DataConfig(source=str(TEXT), prepared_url=f"{folder}/data", held_out_fraction=0.2),
        train=TrainConfig(**{**train, **changes.pop("train", {})}),
        scaling=ScalingConfig(**{"wait_s": 60.0, "settle_s": 0.0, **changes.pop("scaling", {})}),
        checkpoint=CheckpointConfig(**{"every": 0, "snapshot_every": 1, **changes.pop("checkpoint", {})}),
        recovery=RecoveryConfig(**{"max_failures": -1, "free_retries": 1000, **(recovery or {})}),
        seed=3,
    )
    return replace(config, **changes)


def tensors_of(url: str, manifest: Manifest | None = None, endpoint: str = "") -> dict[tuple[str, str], np.ndarray]:
    """Return every tensor of a run's checkpoint, of the newest unless another is given, by kind and name."""
    store = Store(url, endpoint)
    reader = CheckpointReader(store, manifest or RunLog(store).manifest())
    return {(kind, name): reader.tensor(kind, name) for kind in reader.kinds for name in reader.names(kind)}


@dataclass
class Notes:
    """A Recorder that keeps everything, and checks that each step comes once and in order."""

    tally: Tally = field(default_factory=lambda: Tally(time.monotonic()))
    marks: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": -1})
    rows: list[StepDone] = field(default_factory=list)
    worlds: list[int] = field(default_factory=list)
    validations: list[Validated] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    usages: list[NodeUsage] = field(default_factory=list)
    stacks: dict[str, str] = field(default_factory=dict)
    slow_ranks: list[dict[int, float]] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    on_step: Callable[[int], None] = lambda step: None
    on_event: Callable[[Event], None] = lambda event: None

    def step(self, report: StepDone, world_size: int) -> None:
        assert not self.rows or report.step == self.rows[-1].step + 1, "each step once, in order"
        self.rows.append(report)
        self.worlds.append(world_size)
        self.on_step(report.step)

    def report(self, report: Report) -> None:
        if isinstance(report, Validated):
            self.validations.append(report)

    def event(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)

    def stack(self, name: str, text: str) -> None:
        self.stacks[name] = text

    def usage(self, usage: NodeUsage) -> None:
        self.usages.append(usage)

    def slow(self, ranks: dict[int, float]) -> None:
        self.slow_ranks.append(ranks)

    def committed(self, step: int) -> None:
        self.commits.append(step)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def before_commit(self, step: int) -> dict[str, float]:
        return {}

    def close(self, now: float) -> None:
        pass

    def complete(self, result: RunResult) -> None:
        pass

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def faults(self) -> list[Fault]:
        return self.of(Fault)

    @property
    def recoveries(self) -> list[Recovery]:
        return self.of(Recovery)

    @property
    def memberships(self) -> list[Membership]:
        return self.of(Membership)

    @property
    def losses(self) -> list[float]:
        return [row.loss for row in self.rows]


class Lead:
    """One driver's attempt, in a thread of its own, so that a test can break things meanwhile.

    The run's folder is `folder/run`, or a folder `run` at `url`.
    """

    def __init__(
        self,
        config: RunConfig,
        cluster: Cluster,
        folder: Path,
        url: str = "",
        living: Living | None = None,
        branch: BranchPoint | None = None,
    ) -> None:
        self.living, self.branch = living, branch
        if branch:
            config = replace(config, train=replace(config.train, init=branch.init, init_state="run"))
        self.config, self.cluster, self.notes = config, cluster, Notes()
        self.corpora = prepare(config.data, s3_endpoint=config.storage.s3_endpoint)
        self.lease = Lease(Store(f"{url or folder}/run", config.storage.s3_endpoint), strict=False)
        self.log = RunLog(self.lease.store)
        origin = None if self.log.commits else beginning(config, self.corpora, branch and branch.origin)
        warn, inputs = self.notes.notices.append, Inputs(self.corpora, warning="")
        self.attempt = Attempt.open(config, inputs, self.lease, lambda *_: self.notes, warn, self.log, origin)
        self.pool = Pool(cluster, config.scaling, config.storage, new_token(), config.recovery.hang_s, warn)
        self.pool.rehearsal = self.attempt.task
        self.stop = StopSignal()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def controller(self) -> Controller:
        return self.attempt.controller

    @property
    def outcome(self) -> str:
        return self.attempt.status

    def __enter__(self) -> "Lead":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.requests = 2
        self._thread.join(60)

    def wait(self, timeout_s: float = 240) -> Notes:
        """Wait for the end, and raise what the controller raised."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), (self.notes.notices, self.notes.events[-3:], self.notes.rows[-1:])
        if self.error:
            raise self.error
        return self.notes

    def _run(self) -> None:
        least = self.config.scaling.min_workers
        try:
            with self.lease, self.pool:
                self.pool.wait(lambda: self.pool.num_slots >= least and not self.pool.num_starting, self.stop.check)
                self.attempt.train(self.pool, self.stop, living=self.living, branch=self.branch)
        except BaseException as error:
            self.error = error
