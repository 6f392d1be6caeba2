"""A run by the name that a person has for it: its id, its name in MLflow, or its folder."""

from dataclasses import dataclass, field

from orchestrator.reach import reach_tracking
from orchestrator.record.metrics import newest
from workers.common.errors import ConfigError
from workers.common.storage import Store, absolute_url


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow has it; of a run that was named by its folder, no more than that."""

    run_id: str
    url: str
    """The run's folder; empty where it has none yet."""
    name: str = ""
    status: str = ""
    """MLflow's: RUNNING, SCHEDULED, FINISHED, FAILED or KILLED."""
    tracking_uri: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each."""
    s3_endpoint: str = ""
    """Of the S3 store that its folder is in, where that is not AWS."""
    step: int | None = None
    """The last finished step, as far as MLflow has been told; None before the first."""

    @property
    def store(self) -> Store:
        """The run's folder.

        Raises:
            ConfigError: it has none.
        """
        if not self.url:
            raise ConfigError(f"run {self.run_id}: it has not begun; nothing of it is in storage yet")
        return Store(self.url, self.s3_endpoint)


def find(run: str, tracking_uri: str, s3_endpoint: str = "") -> TrackedRun:
    """Find a run.

    Args:
        run: an id or a name in MLflow, or the URL of a run's folder.
        tracking_uri: of MLflow.
        s3_endpoint: of an S3 store that is not AWS; empty for what the run itself has used.

    Raises:
        ConfigError: there is no such run.
        StorageError: MLflow does not answer.
    """
    if "/" in run:
        url = absolute_url(run.rstrip("/"))
        if not Store(url, s3_endpoint).names("log"):
            raise ConfigError(f"{run}: no run's folder (there is no log/ in it)")
        return TrackedRun(url.rsplit("/", 1)[-1], url, s3_endpoint=s3_endpoint)
    reach_tracking(tracking_uri)
    from orchestrator.record.tracking import look_up  # MLflow takes seconds to import.

    known = look_up(tracking_uri, run)
    tags, params = dict(known.data.tags), dict(known.data.params)
    # Nothing else of MLflow's tells at which step the last value came, without the whole history.
    steps = {metric.key: metric.step for metric in known.data.to_proto().metrics}
    step = newest(steps, "loss")
    return TrackedRun(
        known.info.run_id,
        tags.get("raymuon.checkpoint_url", ""),
        known.info.run_name or "",
        known.info.status,
        tracking_uri,
        tags,
        params,
        dict(known.data.metrics),
        s3_endpoint or params.get("storage.s3_endpoint", ""),
        None if step is None else int(step),
    )
