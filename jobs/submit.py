"""`raymuon submit` and `raymuon resume`: a run as a job on a Ray cluster.

Everything that can be refused is refused here, before the run exists: the config, a head that others could use, places
that the cluster's nodes cannot reach. Then the MLflow run is made, so that its id is known from the first moment on;
the job goes on with that very run however often a cluster starts it again.
"""

import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from jobs.environment import CONFIG, pins, working_directory
from jobs.output import nobody_reads
from jobs.ray_jobs import ENDED, RUN_ID, Jobs
from jobs.runs import TrackedRun
from jobs.screen import Screen, mlflow_page
from jobs.settings import Configured, configured_values, warn
from jobs.tell import json_text, tell
from orchestrator.config import RunConfig, absolute, flatten
from orchestrator.preflight import run_store
from orchestrator.reach import reach_tracking
from orchestrator.record.provenance import COMMIT_VARIABLE, provenance
from orchestrator.resumption import check_steps
from workers.common.errors import BY_EXIT_CODE, ClusterError, ConfigError, Interrupted
from workers.data.files import is_standard_library, parts_of
from workers.data.tokenizer import BYTE

if TYPE_CHECKING:
    from orchestrator.record.tracking import Tracking

STOP_WAIT_S = 600
"""How long a job that is asked to stop may take: it finishes its step and saves. Ray would kill it after 3 s."""
STUDY = "raymuon.study"
"""Tag of a study's run: its name."""
JOB, ADDRESS = "raymuon.job_id", "raymuon.job_address"
"""Tags of a run: its newest job, and where that was submitted."""


CONFIG_VARIABLE = "RAYMUON_CONFIG"
WITH_OUR_CODE = "exec python -m jobs "
"""How a job begins. A shell in between would die of what stops the job, at once: where nobody reaps the dead, Ray then
takes the driver that it leaves behind for alive, and waits STOP_WAIT_S for a process that has long saved and ended."""
FROM_IMAGE = f'cd "$(mktemp -d)" && printf %s "${CONFIG_VARIABLE}" > {CONFIG} && exec raymuon '
"""How a job in an image, which has its own raymuon, comes to its config."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a job goes, and in what."""

    address: str
    """URL of the head's dashboard."""
    tracking_uri: str = ""
    """The config's tracking server as this machine reaches it; empty where that is the same URL."""
    image: str = ""
    """Container image for the job, on a cluster whose nodes can start one."""
    pin: bool = False
    """Have the nodes install our versions of everything."""
    allow_open: bool = False
    """Use a head that asks nobody for a token though others can reach it."""
    gpu_type: str = ""
    """Of the cluster, for the plan; empty where `calibration` is given, or nothing is known."""
    calibration: Path | None = None
    """What `raymuon doctor` has measured of the cluster, for the plan."""

    def __post_init__(self) -> None:
        if self.image and self.pin:
            raise ConfigError("--pin and --image: an image has its own versions; give one of the two")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a job does."""

    run_id: str
    """Of the MLflow run that it leads."""
    name: str
    """Of that run."""
    command: str
    """Of raymuon."""
    files: Mapping[str, str]
    """Texts by name, in its working directory; an image takes CONFIG alone."""


def submit(found: Configured, target: Target, follow: bool, as_json: bool) -> None:
    """Submit a new run, say where everything is, and follow its log where that is asked for.

    Raises:
        ConfigError: the config, the head or a place is refused.
        ClusterError: the cluster cannot be reached, or refuses the job.
        StorageError: the tracking server does not answer.
    """
    warn(found)
    run_config = found.config
    check_places(run_config)
    plan = _plan(run_config, target)
    jobs = Jobs(target.address, target.allow_open)
    tracking = tracking_of(target.tracking_uri or run_config.tracking.uri, run_config)
    run_id = tracking.create(run_config.run.name, flatten(asdict(run_config)), begins=False)
    job = new_job(run_id)
    try:
        tracking.keep(run_id, "plan.json", plan)
        _start(jobs, job, target, found, run_id, tracking)
    except BaseException:
        with suppress(ClusterError):
            jobs.stop(job)  # It may be there, and only the answer lost.
        tracking.discard(run_id)  # No run without a job.
        raise
    _tell(jobs, run_config, run_id, job, tracking, as_json)
    if follow:
        watch(jobs, job, run_id)


def resume(found: TrackedRun, overrides: list[str], target: Target, follow: bool, as_json: bool) -> None:
    """Submit a job that goes on with a run, with the config that it had and the code that is here.

    Raises:
        ConfigError: the run is finished, a job leads it, or the config is refused.
        ClusterError: the cluster cannot be reached, or refuses the job.
    """
    if not found.tracking_uri:
        raise ConfigError(f"run {found.run_id}: name it by its id in MLflow, not by its folder; its job is known there")
    if STUDY in found.tags:
        raise ConfigError(f"run {found.run_id} is a study: raymuon submit FILE --study goes on with it")
    from orchestrator.record.tracking import read_artifact

    values = OmegaConf.create(read_artifact(found.tracking_uri, found.run_id, CONFIG))
    now = configured_values(values, [], overrides, f"of run {found.run_id}")
    run_config = now.config
    # As MLflow knows it: storage may be out of reach from here.
    at = found.tags.get("raymuon.checkpoint", "").rpartition("@")[2]
    finished = found.status == "FINISHED"
    reached = int(at) if at.isdigit() else (found.step or 0) if finished else 0
    if notice := check_steps(found.run_id, reached, run_config.train.steps, finished):
        sys.stderr.write(f"{notice}\n")
    check_places(run_config)
    jobs = Jobs(target.address, target.allow_open)
    tracking = tracking_of(found.tracking_uri, run_config)
    if running := [job for job in jobs.of_run(found.run_id) if jobs.info(job)["status"] not in ENDED]:
        raise ConfigError(f"run {found.run_id}: job {running[-1]} leads it; first: raymuon stop {found.run_id}")
    job = new_job(found.run_id)
    _start(jobs, job, target, now, found.run_id, tracking)
    _tell(jobs, run_config, found.run_id, job, tracking, as_json)
    if follow:
        watch(jobs, job, found.run_id)


def check_places(config: RunConfig) -> None:
    """Refuse places that would lie in the job's temporary folder on the head, which goes with the job.

    Raises:
        ConfigError: with every such key; or a URL cannot be a place for files.
    """
    absolute(config)  # Only for what it refuses: the job makes its paths absolute where it runs.
    places = {
        "checkpoint.url": config.checkpoint.url,
        "data.prepared_url": config.data.prepared_url,
        "data.ledger": config.data.ledger,
        "data.tokenizer": config.data.tokenizer if config.data.tokenizer != BYTE else "",
        "train.init": config.train.init if "/" in config.train.init else "",  # Else a run.
        "tracking.uri": config.tracking.uri.removeprefix("sqlite:///"),
    }
    texts = parts_of(config.data.source, ask_servers=False)
    places["data.source"] = next((text for text in texts if not is_standard_library(text) and _relative(text)), "")
    if relative := {key: url for key, url in places.items() if _relative(url)}:
        told = "\n".join(f"  {key}={url}" for key, url in relative.items())
        raise ConfigError(
            f"a job's working directory goes with the job, and these lie in it:\n{told}\n"
            "name places that all nodes reach: s3://bucket/..., http://server:5000, or an absolute path that they share"
        )


def _relative(url: str) -> bool:
    return bool(url) and "://" not in url and not url.startswith("/")


def watch(jobs: Jobs, job: str, run_id: str, unread: bool = True) -> None:
    """Hand on a job's output until it ends, and end as it did.

    Args:
        jobs: of the cluster.
        job: its submission id.
        run_id: of its run.
        unread: wait for the end also when nobody reads the output any more; otherwise end then.

    Raises:
        Interrupted: a person stops watching; the job goes on.
        RaymuonError: the job failed, with the exit code of its own error.
    """

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        if nobody_reads() and not unread:
            raise SystemExit(0)

    try:
        jobs.follow(job, write)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"the job goes on; watch it with: raymuon logs {run_id} --follow, stop it with: raymuon stop {run_id}"
        ) from error
    ended = jobs.info(job)
    if ended["status"] == "STOPPED":
        raise Interrupted(f"job {job} was stopped; go on with: raymuon resume {run_id}")
    if ended["status"] not in ENDED:
        raise ClusterError(f"the log of job {job} is cut off, the job may go on; see: raymuon status {run_id}")
    if ended["status"] != "SUCCEEDED":
        error = BY_EXIT_CODE.get(ended["exit_code"], ClusterError)
        raise error(f"job {job} ended with {ended['status']} (exit code {ended['exit_code']}); its log is above")


def _plan(config: RunConfig, target: Target) -> str:
    """Return the plan of the run on all its workers as JSON: without a known device, how its matrices are shared out.

    Raises:
        ConfigError: it does not fit, and what would.
    """
    from jobs.planning.command import read_calibration
    from jobs.planning.estimate import Machines
    from jobs.planning.matrices import orthogonalization
    from jobs.planning.plan import plan_run

    gpus = config.scaling.max_workers
    calibration = read_calibration(target.calibration) if target.calibration else None
    machines = Machines(gpus=gpus, gpu_type=target.gpu_type, calibration=calibration)
    if not machines.known:
        told = orthogonalization(config, gpus).as_dict() if config.optim.name == "muon" else {"gpus": gpus}
        return json_text(told, indent=1)
    plan = plan_run(config, machines)
    plan.require_fit()
    Screen(stderr=True).print(plan.summary())
    return json_text(plan.as_dict(), indent=1)


def new_job(run_id: str) -> str:
    """Return a job's submission id."""
    return f"raymuon-{run_id[:12]}-{secrets.token_hex(3)}"


def _start(jobs: Jobs, job: str, target: Target, found: Configured, run_id: str, tracking: "Tracking") -> None:
    """Submit a job that trains the run, or goes on with it. Last of all, so that no job is there without a record."""
    resolved = found.yaml()
    tracking.keep(run_id, CONFIG, resolved)
    tracking.tag(run_id, {**found.tags, "raymuon.checkpoint_url": run_store(found.config, run_id).url})
    work = Work(
        run_id=run_id,
        name=found.config.run.name,
        command=f"train {CONFIG} --resume {run_id} --address auto",
        files={CONFIG: resolved},
    )
    start_job(jobs, job, target, work, tracking)


def start_job(jobs: Jobs, job: str, target: Target, work: Work, tracking: "Tracking") -> None:
    """Submit a job under an id, which the run's tags have from then on.

    Raises:
        ClusterError: it is refused.
    """
    code = provenance()
    known = {"raymuon.commit": code.commit or "unknown", "raymuon.code": code.digest}
    tracking.tag(work.run_id, {JOB: job, ADDRESS: jobs.address, **known})
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    metadata = {RUN_ID: work.run_id, "name": work.name}
    if target.image:
        variables[CONFIG_VARIABLE] = work.files[CONFIG]
        jobs.submit(job, FROM_IMAGE + work.command, image_env(target.image, variables), metadata)
        return
    if code.commit:
        variables[COMMIT_VARIABLE] = code.commit
    with working_directory(work.files) as folder:
        runtime_env: dict[str, Any] = {"working_dir": str(folder), "env_vars": variables}
        if target.pin:
            runtime_env["pip"] = {"packages": pins(), "pip_check": False}
        jobs.submit(job, WITH_OUR_CODE + work.command, runtime_env, metadata)


def image_env(image: str, variables: dict[str, str]) -> dict[str, Any]:
    """Return Ray's runtime environment of a job in a container, beside which Ray takes no working directory.

    Not run: it needs nodes with podman.
    """
    return {"image_uri": image, "env_vars": variables}


def tracking_of(uri: str, config: RunConfig) -> "Tracking":
    """Open the tracking of a config, which this machine may know by another URI."""
    reach_tracking(uri)
    from orchestrator.record.tracking import Tracking  # MLflow takes seconds to import.

    return Tracking(replace(config.tracking, uri=uri))


def _tell(jobs: Jobs, config: RunConfig, run_id: str, job: str, tracking: "Tracking", as_json: bool) -> None:
    tell_job(jobs, job, run_id, run_store(config, run_id).url, tracking, as_json)
    if not as_json:
        see = f"raymuon logs {run_id} --follow; see also raymuon status, stop, resume, replay"
        Screen().print(f"\nwatch it with: {see}")


def tell_job(jobs: Jobs, job: str, run_id: str, checkpoints: str, tracking: "Tracking", as_json: bool) -> None:
    """Say where everything is."""
    told = {
        "run_id": run_id,
        "job": job,
        "dashboard": f"{jobs.address}/#/jobs/{job}",
        "checkpoints": checkpoints,
        "mlflow": mlflow_page(tracking.uri, tracking.page(run_id)),
    }
    if as_json:
        tell(told)
        return
    console = Screen()
    for key, text in told.items():
        console.print(f"{key.replace('_', ' '):12} {text}")
