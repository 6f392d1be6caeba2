"""Jobs on a Ray cluster, over its Job Submission API: one place that knows Ray's client and its errors.

A job's metadata, environment and working directory are shown to whoever may see the cluster: no secret goes there.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs.environment import variables
from orchestrator.group.access import Access, head_access
from workers.common.errors import ClusterError, ConfigError

RUN_ID = "raymuon.run_id"
"""The key of a job's metadata that names its run."""
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
"""Ray's loggers that tell of every package; they set their levels when they are imported."""
AGENT_S = 60.0
"""How long a head may take to be ready for jobs after its dashboard answers."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs:
    """The jobs of one cluster.

    Args:
        address: URL of its dashboard.
        allow_open: use a head that asks nobody for a token though others can reach it.

    Raises:
        ConfigError: such a head, or an address that is none.
        ClusterError: nobody answers there, or it does not take our token.
    """

    def __init__(self, address: str, allow_open: bool = False) -> None:
        self.address = address.rstrip("/")
        _admit(head_access(self.address), allow_open)
        from jobs.ray_client import Client  # A second's import, after the quick refusals.

        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        # Ray's client prefers what the environment names to its argument: a head that was not looked at.
        with cluster_errors(self.address), variables(RAY_API_SERVER_ADDRESS=self.address):
            self.client = Client(self.address)

    def submit(self, job: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Submit a job under an id of our own.

        Raises:
            ClusterError: it is refused.
        """
        deadline = time.monotonic() + AGENT_S
        with cluster_errors(self.address):
            while True:
                try:
                    self.client.submit_job(
                        entrypoint=entrypoint, submission_id=job, runtime_env=runtime_env, metadata=metadata
                    )
                    return
                except RuntimeError as error:  # A head that has just started is not yet complete.
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(1.0)

    def of_run(self, run_id: str) -> list[str]:
        """Return the submission ids of a run's jobs, oldest first."""
        with cluster_errors(self.address):
            jobs = [job for job in self.client.list_jobs() if (job.metadata or {}).get(RUN_ID) == run_id]
        return [job.submission_id for job in sorted(jobs, key=lambda job: job.start_time or 0) if job.submission_id]

    def info(self, job: str) -> dict[str, Any]:
        """Return a job's status (PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED), message and exit code."""
        with cluster_errors(self.address, job):
            found = self.client.get_job_info(job)
        return {
            "job": job,
            "status": str(found.status.value),
            "message": found.message or "",
            "exit_code": found.driver_exit_code,
        }

    def logs(self, job: str) -> str:
        """Return what a job has written so far."""
        with cluster_errors(self.address, job):
            return self.client.get_job_logs(job)

    def follow(self, job: str, write: Callable[[str], object]) -> None:
        """Hand on what a job writes, until it ends."""

        async def tail() -> None:
            async for text in self.client.tail_job_logs(job):
                write(text)

        with cluster_errors(self.address, job):
            asyncio.run(tail())

    def stop(self, job: str) -> None:
        """Ask a job to end: raymuon finishes its step and saves."""
        with cluster_errors(self.address, job):
            self.client.stop_job(job)


def _admit(access: Access, allow_open: bool) -> None:
    """Refuse a head that anybody could use, and one that does not take us."""
    if access.exposed and not allow_open:
        raise ConfigError(
            f"--address {access.url}: this head asks nobody for a token, and other machines can reach it: whoever does "
            "runs code on its nodes. Start it with RAY_AUTH_MODE=token and reach it through a tunnel, or use it as it "
            "is with --allow-open-head"
        )
    if access.asks_for_token and not access.accepts_ours:
        ours = "there is none here" if access.accepts_ours is None else "ours is another one"
        raise ClusterError(
            f"--address {access.url}: this head asks for a token, and {ours}; put it into ~/.ray/auth_token, or name "
            "its file in RAY_AUTH_TOKEN_PATH"
        )
    if access.asks_for_token:
        os.environ["RAY_AUTH_MODE"] = "token"  # Ray's client sends the token only then.


@contextmanager
def cluster_errors(address: str, job: str = "") -> Iterator[None]:
    """Turn what Ray's client raises into a ClusterError."""
    try:
        yield
    except (ClusterError, ConfigError):
        raise
    except Exception as error:  # RuntimeError for most, ConnectionError, and those of requests and aiohttp.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if job and ("does not exist" in str(error) or "404" in first):
            raise ClusterError(f"{address}: there is no job {job}; the cluster that had it may be gone") from error
        raise ClusterError(f"{address}: {first}") from error
