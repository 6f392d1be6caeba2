"""What MLflow calls what a run measures.

MLflow's UI makes a group of charts of all names that are the same up to their last slash, and orders groups and
charts by name; names without a group come last. So what people compare is in groups that come first, in the order
`loss`, `optim`, `performance`, `run`, and what explains it follows under `telemetry` and `traffic`. The journal,
checkpoints and this code use the plain names, which are also those of runs of before there were groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from workers.recipe import TrainConfig


@dataclass(frozen=True, slots=True)
class NodeUsage:
    """How busy a node is at a time (seconds since the epoch), by MLflow's names of system metrics."""

    node: str
    time: float
    values: dict[str, float]


GROUPS = {
    "loss": {"loss": "train", "val_loss": "validation", "val_bits_per_byte": "validation_bits_per_byte"},
    "optim": dict.fromkeys(("grad_norm", "lr", "skipped_steps")),
    "performance": dict.fromkeys(("tokens_per_second", "step_seconds", "mfu")),
    "run": dict.fromkeys(
        (
            *("world_size", "tokens", "stage", "global_batch", "snapshot_every", "snapshot_seconds"),
            *("goodput", "faults", "recovery_seconds", "recovery_steps_redone", "recovery_storage_bytes"),
        )
    ),
    "telemetry/expert_load": {"expert_imbalance": "imbalance"},
    "telemetry/memory": dict.fromkeys(
        ("micro_batch", "recomputed_layers", "chunked_logits", "partitioned_gradients", "fp32_accumulation")
    ),
}
"""The group of each plain name, and what it is called there if not the same."""
STDERR = "_stderr"
"""What lm-eval calls the standard error of a metric, after its name."""
NAMES = {plain: f"{group}/{called or plain}" for group, names in GROUPS.items() for plain, called in names.items()}


def memory_saving(train: "TrainConfig", num_layers: int) -> dict[str, float]:
    """Return how a generation saves memory as numbers, yes being 1; nothing in `train` is automatic."""
    return {
        "micro_batch": train.micro_batch,
        "recomputed_layers": train.recomputed(num_layers),
        "chunked_logits": train.logits == "chunked",
        "partitioned_gradients": train.gradients == "partitioned",
        "fp32_accumulation": train.accumulate == "fp32",
    }


def published(metric: str) -> str:
    """Return the name of a metric in MLflow; one that nobody knows keeps its own."""
    if metric in NAMES:
        return NAMES[metric]
    group, slash, rest = metric.partition("/")
    if not slash or group in ("data", "eval", "system"):  # The last is MLflow's own, of its system metrics.
        return metric
    if group == "val_loss":  # Beside the others, and no folder of the name that the mean has.
        return f"loss/validation_by_source/{rest}"
    return f"traffic/{rest}" if group == "bytes_sent" else f"telemetry/{metric}"


def read_history(client: "MlflowClient", run_id: str, metric: str) -> list["Metric"]:
    """Return all that MLflow has of a metric by its plain name, in the order of steps."""
    names = dict.fromkeys((published(metric), metric))
    found = [one for name in names for one in client.get_metric_history(run_id, name)]
    return sorted(found, key=lambda one: (one.step, one.value))


def newest(metrics: Mapping[str, float], metric: str) -> float | None:
    """Return the last value of a metric by its plain name, out of those that MLflow has of a run; None without one."""
    return metrics.get(published(metric), metrics.get(metric))
