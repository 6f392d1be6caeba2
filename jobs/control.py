"""`raymuon status`, `logs` and `stop`: a submitted run, from anywhere, by its id."""

import sys
import time
from typing import Any

from jobs.ray_jobs import ENDED, Jobs
from jobs.runs import TrackedRun
from jobs.screen import Screen
from jobs.submit import ADDRESS, JOB, watch
from jobs.tell import tell
from orchestrator.log.run_log import RunLog
from orchestrator.record.metrics import newest
from workers.common.errors import ClusterError, ConfigError, RaymuonError

SHOWN = ("loss", "val_loss", "world_size", "tokens", "tokens_per_second", "goodput", "faults")
"""Metrics of a status."""
COUNTS = ("world_size", "tokens", "faults")
"""Those of them that are whole numbers, which MLflow keeps as floats."""


def job_of(found: TrackedRun, address: str, allow_open: bool) -> tuple[Jobs, str]:
    """Return the cluster and the newest job of a run.

    Raises:
        ConfigError: nobody knows of a job.
        ClusterError: the cluster does not answer.
    """
    where = address or found.tags.get(ADDRESS, "")
    if not where:
        raise ConfigError(
            f"run {found.run_id} was not submitted with raymuon submit; name the head of its cluster with --address"
        )
    jobs = Jobs(where, allow_open)
    # A cluster's own retry, or a job submitted by hand, is known to the cluster alone.
    known = jobs.of_run(found.run_id) or [found.tags.get(JOB, "")]
    if not known[-1]:
        raise ConfigError(f"run {found.run_id}: {where} has no job of it")
    return jobs, known[-1]


def status(found: TrackedRun, address: str, allow_open: bool, as_json: bool) -> None:
    """Show where a run is: MLflow's view, its job's, and its newest checkpoint."""
    told: dict[str, Any] = {"run_id": found.run_id, "name": found.name, "status": found.status}
    if found.step is not None:
        told["step"] = found.step
        told["steps"] = int(found.tags.get("raymuon.steps") or found.params["train.steps"])
    if stage := found.tags.get("raymuon.stage"):
        told["stage"] = stage
    if settings := found.tags.get("raymuon.settings"):
        told["settings"] = settings
    metrics = {key: newest(found.metrics, key) for key in SHOWN}
    told |= {key: int(value) if key in COUNTS else value for key, value in metrics.items() if value is not None}
    if recoveries := found.tags.get("raymuon.recoveries"):
        told["recoveries"] = int(recoveries)
    if last := found.tags.get("raymuon.last_event"):
        told["last_event"] = last
    told |= _checkpoint(found)
    told["job"] = _job(found, address, allow_open)
    if as_json:
        tell(told)
        return
    if (steps := told.pop("steps", None)) is not None:
        told["step"] = f"{told['step']:,} of {steps:,}"
    console = Screen()
    for key, value in told.items():
        if value is None:
            continue
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        console.print(f"{key.replace('_', ' '):18} {text}")


def logs(found: TrackedRun, address: str, allow_open: bool, follow: bool) -> None:
    """Print what a run's newest job has written, or follow it to its end."""
    jobs, job = job_of(found, address, allow_open)
    if follow:
        watch(jobs, job, found.run_id, unread=False)
    else:
        sys.stdout.write(jobs.logs(job))


def stop(found: TrackedRun, address: str, allow_open: bool, wait_s: float) -> None:
    """Ask a run's job to finish its step and save, and wait until it has.

    Raises:
        ClusterError: it has not ended in time; it may still be saving.
    """
    jobs, job = job_of(found, address, allow_open)
    console = Screen(stderr=True)
    if (ended := jobs.info(job)["status"]) in ENDED:
        console.print(f"job {job} has ended already: {ended}")
        return
    jobs.stop(job)
    console.print(f"job {job} finishes its step and saves ...", style="dim")
    deadline = time.monotonic() + wait_s
    while (ended := jobs.info(job)["status"]) not in ENDED:
        if time.monotonic() > deadline:
            raise ClusterError(f"job {job} has not ended within {wait_s:g} s; see raymuon logs {found.run_id}")
        time.sleep(0.5)
    console.print(f"job {job}: {ended}. Go on with: raymuon resume {found.run_id}")


def _checkpoint(found: TrackedRun) -> dict[str, Any]:
    """Return the newest checkpoint, as the run's folder tells it."""
    if not found.url:
        return {"checkpoint": "none yet"}
    try:
        commit = RunLog(found.store).find()
    except RaymuonError as error:  # Storage may be out of reach from here.
        return {"checkpoint": f"{found.tags.get('raymuon.checkpoint', 'unknown')} ({error})"}
    if commit:
        return {"checkpoint": f"{found.url}@{commit.step}"}
    # A folder on another machine's disk is empty here, and no error.
    known = found.tags.get("raymuon.checkpoint")
    return {"checkpoint": f"{known} (not seen from here)" if known else "none yet"}


def _job(found: TrackedRun, address: str, allow_open: bool) -> str | None:
    """Return the run's newest job and its state; None of a run that nobody has submitted."""
    if not address and ADDRESS not in found.tags:
        return None
    try:
        jobs, job = job_of(found, address, allow_open)
        told = jobs.info(job)
    except RaymuonError as error:  # A cluster that is gone does not hide what MLflow knows.
        return str(error)
    return f"{told['job']} {told['status']}" + (f", exit code {told['exit_code']}" if told["exit_code"] else "")
