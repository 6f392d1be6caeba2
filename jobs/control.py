"""`raymuon status`, `logs` and `stop`: a submitted run, from anywhere, by its id."""

import sys
import time
from typing import Any

from rich.console import Console

from jobs.ray_jobs import ENDED, Jobs
from jobs.runs import Found
from jobs.submit import ADDRESS, JOB, watch
from jobs.tell import tell
from orchestrator.run_log import RunLog
from workers.errors import ClusterError, ConfigError, RaymuonError
from workers.storage import Store

SHOWN = ("loss", "val_loss", "world_size", "tokens", "tokens_per_second", "goodput", "faults")
"""Metrics of a status."""


def job_of(found: Found, address: str, allow_open: bool) -> tuple[Jobs, str]:
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


def status(found: Found, address: str, allow_open: bool, as_json: bool) -> None:
    """Show where a run is: MLflow's view, its job's, and its newest checkpoint."""
    told: dict[str, Any] = {"run_id": found.run_id, "name": found.name, "status": found.status}
    if found.step is not None:
        told["step"] = f"{found.step} of {found.tags.get('raymuon.steps') or found.params['train.steps']}"
    told |= {key: found.metrics[key] for key in SHOWN if key in found.metrics}
    told |= {
        key: found.tags[f"raymuon.{key}"] for key in ("recoveries", "last_event") if f"raymuon.{key}" in found.tags
    }
    told |= _checkpoint(found)
    told["job"] = _job(found, address, allow_open)
    if as_json:
        tell(told)
        return
    console = Console(highlight=False)
    for key, value in told.items():
        text = f"{value:,.4g}" if isinstance(value, float) else str(value)
        console.print(f"{key.replace('_', ' '):18} {text}", soft_wrap=True, markup=False)


def logs(found: Found, address: str, allow_open: bool, follow: bool) -> None:
    """Print what a run's newest job has written, or follow it to its end."""
    jobs, job = job_of(found, address, allow_open)
    if follow:
        watch(jobs, job, found.run_id, unread=False)
    else:
        sys.stdout.write(jobs.logs(job))


def stop(found: Found, address: str, allow_open: bool, wait_s: float) -> None:
    """Ask a run's job to finish its step and save, and wait until it has.

    Raises:
        ClusterError: it has not ended in time; it may still be saving.
    """
    jobs, job = job_of(found, address, allow_open)
    console = Console(stderr=True, highlight=False)
    if (ended := jobs.info(job)["status"]) in ENDED:
        console.print(f"job {job} has ended already: {ended}")
        return
    jobs.stop(job)
    console.print(f"[dim]job {job} finishes its step and saves ...[/dim]")
    deadline = time.monotonic() + wait_s
    while (ended := jobs.info(job)["status"]) not in ENDED:
        if time.monotonic() > deadline:
            raise ClusterError(f"job {job} has not ended within {wait_s:g} s; see raymuon logs {found.run_id}")
        time.sleep(0.5)
    console.print(f"job {job}: {ended}. Go on with: raymuon resume {found.run_id}", soft_wrap=True)


def _checkpoint(found: Found) -> dict[str, Any]:
    """Return the newest checkpoint, as the run's folder tells it."""
    if not found.url:
        return {"checkpoint": "none yet"}
    try:
        commit = RunLog(Store(found.url)).find()
    except RaymuonError as error:  # Storage may be out of reach from here.
        return {"checkpoint": f"{found.tags.get('raymuon.checkpoint', 'unknown')} ({error})"}
    if commit:
        return {"checkpoint": f"{found.url}@{commit.step}"}
    # A folder on another machine's disk is empty here, and no error.
    known = found.tags.get("raymuon.checkpoint")
    return {"checkpoint": f"{known} (not seen from here)" if known else "none yet"}


def _job(found: Found, address: str, allow_open: bool) -> Any:
    try:
        jobs, job = job_of(found, address, allow_open)
        told = jobs.info(job)
    except RaymuonError as error:  # A cluster that is gone does not hide what MLflow knows.
        return str(error)
    return f"{told['job']} {told['status']}" + (f", exit code {told['exit_code']}" if told["exit_code"] else "")
