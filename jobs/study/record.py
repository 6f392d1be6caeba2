"""A study in MLflow: a parent run, and a nested run of each trial. All that is told of a study is read from there.

A trial's run is made before it begins, and is begun and gone on with alike; so its name finds it again, however often
the study was killed.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.load import as_yaml, values_of
from jobs.study.file import StudyFile, last_step, load_study
from jobs.study.question import Outcome, Trial
from jobs.study.size import Size, size_of
from jobs.submit import STUDY
from orchestrator.config import RunConfig, flatten
from orchestrator.record.metrics import newest, read_history
from orchestrator.record.report import DESCRIPTION
from workers.common.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from orchestrator.record.tracking import Tracking

QUESTION = "raymuon.study.question"
"""Tag of a study's run, beside its name: what it asks."""
TRIAL, FAILED, SIZE = "raymuon.study.trial", "raymuon.study.failed", "raymuon.study.size"
"""Tags of a trial's run: what was asked for, as JSON; why it would fail again; what it costs, as JSON."""
NAME, COORDINATES = "raymuon.study.name", "raymuon.study.coordinates"
"""Of a trial: its name, and where it is on each axis, as JSON."""
PARENT = "mlflow.parentRunId"
"""MLflow's own: its UI nests a run below that one."""
FILE, BASE, REPORT = "study.yaml", "base", "report"
"""Artifacts of a study's run: its file, and folders with the config of its trials and its report."""
NOISE_SCALE = "telemetry/gradient_noise/scale"
"""Metric of a trial's run."""
PAGE = 100
"""Runs that MLflow is asked for at a time."""
SAME = ("model.", "data.", "optim.", "train.", "telemetry.every", "seed", "checkpoint.url")
"""Keys that decide what a trial comes to, and where its checkpoints are."""
OTHER = ("data.prepared_url", "data.ledger")
"""Of these, such as do not."""
BRANCHED = ("train.init", "train.init_state")
"""Those of a branch, which the engine sets."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a trial is expected to take of a machine."""

    first_step: int
    last_step: int
    workers: int
    flops: float
    """Of the model and the optimizer, for the steps that are its own."""

    @property
    def steps(self) -> int:
        """Its own."""
        return max(1, self.last_step - self.first_step + 1)


@dataclass(frozen=True)
class Begun:
    """A trial that has a run."""

    run_id: str
    name: str
    status: str
    """MLflow's: SCHEDULED, RUNNING, FINISHED, FAILED or KILLED."""
    failed: str
    """Why it would fail again; empty where it would not."""
    asked: dict[str, Any]
    params: dict[str, str] = field(repr=False)
    size: Size
    cost: Cost
    step: int
    """The last one; before the first, that from which it branches."""
    saved: int
    """The step of its newest checkpoint; 0 before the first."""
    loss: float | None
    val_loss: float | None

    @property
    def ended(self) -> bool:
        """Tell whether it has come to what it comes to."""
        return self.status == "FINISHED" or bool(self.failed)


class StudyRecord:
    """The run of a study."""

    def __init__(self, tracking: "Tracking", run_id: str) -> None:
        self.tracking, self.run_id = tracking, run_id

    @staticmethod
    def find(tracking: "Tracking", name: str) -> "StudyRecord | None":
        """Return the study of a name, the first where there are several; None where there is none."""
        quoted = name.replace('"', "")
        with tracking.reach():
            found = tracking.client.search_runs(
                [tracking.experiment_id], f'attributes.run_name = "{quoted}" and tags.`{STUDY}` = "{quoted}"'
            )
        first = min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
        return first and StudyRecord(tracking, first.info.run_id)

    @staticmethod
    def create(tracking: "Tracking", found: StudyFile) -> "StudyRecord":
        """Make the run of a study; of two processes that do it at the same time both get the same one."""
        study = found.study
        tags = {STUDY: study.name, QUESTION: study.question.name}
        ours = tracking.create(study.name, flatten(asdict(study)), begins=False, tags=tags)
        first = StudyRecord.find(tracking, study.name)
        if first is None or first.run_id == ours:
            return StudyRecord(tracking, ours)
        tracking.discard(ours)
        return first

    def keep(self, found: StudyFile) -> None:
        """Keep the study's file and its base: what it is asked again by."""
        for name, text in files_of(found, FILE).items():
            self.tracking.keep(self.run_id, name, text)

    def status(self, status: str) -> None:
        """Set it: RUNNING while trials are trained, then FINISHED, FAILED or KILLED."""
        with self.tracking.reach():
            if status == "RUNNING":
                self.tracking.client.update_run(self.run_id, status=status)
            else:
                self.tracking.client.set_terminated(self.run_id, status)

    def begin(self, trial: Trial, config: RunConfig, begun: Begun | None = None) -> str:
        """Return the id of a trial's run, which is made if there is none yet."""
        size = {SIZE: json.dumps({**asdict(size_of(config)), **asdict(cost_of(trial, config))})}
        if begun is None:
            tags = {**self._tags(trial), **size}
            return self.tracking.create(config.run.name, flatten(asdict(config)), begins=False, tags=tags)
        self.tracking.tag(begun.run_id, size)  # One that could not begin before has none.
        return begun.run_id

    def refuse(self, trial: Trial, study: str, why: str) -> str:
        """Put down a trial that cannot begin, and return the id of its run."""
        settings = flatten(dict(trial.settings)) | {"seed": trial.seed}
        run_id = self.tracking.create(f"{study}/{trial.name}", settings, begins=False, tags=self._tags(trial))
        self.fail(run_id, why)
        return run_id

    def answered(self, headline: str) -> None:
        """Show what the study has found on its page in MLflow."""
        self.tracking.tag(self.run_id, {DESCRIPTION: headline})

    def fail(self, run_id: str, why: str) -> None:
        """Put down that a trial would fail again."""
        self.tracking.tag(run_id, {FAILED: why[:2000]})
        with self.tracking.reach():
            self.tracking.client.set_terminated(run_id, "FAILED")

    def forget_failures(self) -> bool:
        """Take back that trials would fail again; tell whether there were any."""
        failed = [one.run_id for one in self.begun().values() if one.failed]
        for run_id in failed:
            with self.tracking.reach():
                self.tracking.client.delete_tag(run_id, FAILED)
        return bool(failed)

    def attach(self, folder: Path) -> None:
        """Keep the files of a folder as artifacts of the study's run."""
        self.tracking.attach(self.run_id, folder, REPORT)

    def begun(self) -> dict[str, Begun]:
        """Return all trials that have a run, by name."""
        with self.tracking.reach():
            return {run.data.tags[NAME]: _begun(run) for run in _children(self.tracking.client, self.run_id)}

    def outcomes(self) -> dict[str, Outcome]:
        """Return what the trials that have ended have come to, by name."""
        with self.tracking.reach():
            return outcomes(self.tracking.client, self.run_id)

    def outcome(self, run_id: str) -> Outcome | None:
        """Return what a trial has come to; None where it has not ended."""
        with self.tracking.reach():
            return _outcome(self.tracking.client, self.tracking.client.get_run(run_id))

    def address(self, run_id: str) -> str:
        """Return the address of a trial's page, or its id where no server shows it."""
        uri = self.tracking.uri
        return f"{uri.rstrip('/')}/{self.tracking.page(run_id)}" if uri.startswith("http") else run_id

    def losses(self, run_id: str) -> list[tuple[int, float]]:
        """Return the training losses that a trial has so far, `(step, nats per token)`."""
        with self.tracking.reach():
            return _history(self.tracking.client, run_id, "loss")

    def _tags(self, trial: Trial) -> dict[str, str]:
        asked = asked_of(trial)
        coordinates = json.dumps(asked["coordinates"])
        return {PARENT: self.run_id, NAME: trial.name, COORDINATES: coordinates, TRIAL: json.dumps(asked)}


def outcomes(client: "MlflowClient", parent_run_id: str) -> dict[str, Outcome]:
    """Return what the trials of a study have come to, by name: of those that have ended, and from MLflow alone."""
    found = (_outcome(client, run) for run in _children(client, parent_run_id))
    return {one.trial: one for one in found if one is not None}


def files_of(found: StudyFile, name: str) -> dict[str, str]:
    """Return a study's file under a name, and its base as it is now in a folder beside: all that makes it again."""
    base = f"{BASE}/{found.study.base_name}.yaml"
    return {name: replace(found, study=replace(found.study, base=base)).yaml(), base: as_yaml(found.base)}


@contextmanager
def stored_study(uri: str, run_id: str) -> Iterator[StudyFile]:
    """Read a study as its run has it; its base is there while the block lasts.

    Raises:
        ConfigError: the run is no study's.
        StorageError: MLflow does not answer.
    """
    from orchestrator.record.tracking import read_artifact

    with tempfile.TemporaryDirectory(prefix="raymuon-study-") as folder:
        file = Path(folder, FILE)
        file.write_text(read_artifact(uri, run_id, FILE))
        base = file.parent / values_of(file)["base"]
        base.parent.mkdir()
        base.write_text(read_artifact(uri, run_id, f"{BASE}/{base.name}"))
        yield load_study(str(file))


def asked_of(trial: Trial) -> dict[str, Any]:
    """Return what of a trial is not in its config, as JSON has it."""
    branch = trial.branch and asdict(trial.branch)
    asked = {"seed": trial.seed, "branch": branch, "stop_at": trial.stop_at, "coordinates": dict(trial.coordinates)}
    return json.loads(json.dumps(asked))


def cost_of(trial: Trial, config: RunConfig) -> Cost:
    """Return what a trial is expected to take."""
    size, recipe = size_of(config), config.recipe
    first, last = (trial.branch.step if trial.branch else 0) + 1, last_step(trial, config)
    samples = recipe.samples_before(last) + recipe.at(last).global_batch - recipe.samples_before(first)
    flops = samples * config.train.seq_len * size.flops_per_token + (last - first + 1) * size.optimizer_flops
    return Cost(first_step=first, last_step=last, workers=workers_of(config), flops=flops)


def workers_of(config: RunConfig) -> int:
    """Return how many slots a trial takes."""
    return config.scaling.max_workers + config.scaling.standby


def check_same(begun: Mapping[str, Begun], trials: Sequence[Trial], configs: Mapping[str, RunConfig]) -> None:
    """Refuse a study that does not ask for all that it has begun, as it was.

    Args:
        begun: trials that have a run.
        trials: that the study asks for now, knowing what they have come to.
        configs: of these, with absolute paths.

    Raises:
        ConfigError: with each trial and each key that differs.
    """
    asked = {trial.name: trial for trial in trials}
    differ = []
    for name, one in begun.items():
        if name not in asked:
            differ.append(f"  {name} (run {one.run_id}): is not asked for any more")
        elif name in configs:
            differ += [f"  {name}: {text}" for text in _differences(one, asked[name], configs[name])]
    if differ:
        raise ConfigError(
            "the study is not the one that has begun:\n"
            + "\n".join(differ)
            + "\nmake them equal; more seeds or points may come. With --name NAME it is another study"
        )


def _differences(begun: Begun, trial: Trial, config: RunConfig) -> Iterator[str]:
    asked = asked_of(trial)
    for key, had in begun.asked.items():
        if asked.get(key) != had:
            yield f"{key}: it has begun with {had}, the study has {asked.get(key)}"
    now = {key: str(value)[:6000] for key, value in flatten(asdict(config)).items()}
    for key, had in begun.params.items():  # Of an older version, whose keys are fewer.
        ours = key.startswith(SAME) and key not in OTHER and not (key in BRANCHED and trial.branch)
        if ours and key in now and now[key] != had:
            yield f"{key}: it has begun with {had}, the study has {now[key]}"


def _children(client: "MlflowClient", parent_run_id: str) -> list["Run"]:
    """Return the runs of a study's trials, the oldest first."""
    experiment = client.get_run(parent_run_id).info.experiment_id
    found, token = list["Run"](), None
    while True:
        page = client.search_runs(
            [experiment],
            f'tags.`{PARENT}` = "{parent_run_id}"',
            max_results=PAGE,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        found += [run for run in page if NAME in run.data.tags]
        token = page.token
        if not token:
            return found


def _begun(run: "Run") -> Begun:
    tags, metrics = run.data.tags, run.data.metrics
    steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    size, cost = _cost(tags)
    return Begun(
        run.info.run_id,
        tags[NAME],
        run.info.status,
        tags.get(FAILED, ""),
        json.loads(tags[TRIAL]),
        dict(run.data.params),
        size,
        cost,
        int(newest(steps, "loss") or cost.first_step - 1),
        int(tags.get("raymuon.checkpoint", "@0").rpartition("@")[2]),
        newest(metrics, "loss"),
        newest(metrics, "val_loss"),
    )


def _cost(tags: Mapping[str, str]) -> tuple[Size, Cost]:
    """Return what a trial costs; nothing, of one that could not begin."""
    told = json.loads(tags.get(SIZE, "{}"))
    known = {key: told.get(key, 0) for kind in (Size, Cost) for key in kind.__dataclass_fields__}
    size = Size(**{key: known[key] for key in Size.__dataclass_fields__})
    return size, Cost(**{key: known[key] for key in Cost.__dataclass_fields__})


def _outcome(client: "MlflowClient", run: "Run") -> Outcome | None:
    begun = _begun(run)
    if not begun.ended:
        return None
    losses, validation, seconds = (
        _history(client, begun.run_id, metric) for metric in ("loss", "val_loss", "step_seconds")
    )
    steps = losses[-1][0] if losses else 0
    tokens = int(newest(run.data.metrics, "tokens") or 0)
    at_end = [loss for step, loss in validation if step == steps and not begun.failed]
    return Outcome(
        trial=begun.name,
        run_id=begun.run_id,
        status="failed" if begun.failed else "finished",
        error=begun.failed,
        coordinates=begun.asked["coordinates"],
        steps=steps,
        tokens=tokens,
        val_loss=at_end[-1] if at_end else None,
        losses=tuple(losses),
        validation=tuple(validation),
        parameters=begun.size.parameters,
        flops=begun.size.flops_per_token * tokens,
        optimizer_flops=begun.size.optimizer_flops * steps,
        seconds=sum(value for _, value in seconds),
        noise_scale=newest(run.data.metrics, NOISE_SCALE),
    )


def _history(client: "MlflowClient", run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in read_history(client, run_id, metric)]
