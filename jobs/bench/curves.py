"""Muon against AdamW on the demo, each at its own best of three learning rates, in one picture."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.bench.process import raymuon, run_json
from jobs.curves import plot_losses
from orchestrator.config import TrackingConfig
from orchestrator.record.metrics import read_history
from workers.common.errors import TrainingError

LEARNING_RATES = {"muon": (0.8e-2, 1.6e-2, 3.2e-2), "adamw": (1.5e-3, 3e-3, 6e-3)}


def best_rate(losses: Mapping[float, float | None]) -> float:
    """Return the learning rate with the lowest validation loss.

    Raises:
        TrainingError: no rate has a finite one.
    """
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        raise TrainingError(f"no learning rate of {', '.join(f'{rate:g}' for rate in losses)} has a finite loss")
    return min(finite, key=finite.__getitem__)


def curves(picture: Path, overrides: list[str], say: Any) -> dict[str, Any]:
    """Train every optimizer at every rate and draw each one's best run.

    Args:
        picture: path of the PNG.
        overrides: for every run.
        say: takes a line about each run.

    Returns:
        For each optimizer the validation loss by learning rate, and the best rate.
    """
    from orchestrator.record.tracking import Tracking

    found: dict[str, Any] = {}
    drawn = {}
    with tempfile.TemporaryDirectory(prefix="raymuon-curves-") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        places = [f"tracking.uri={uri}", f"checkpoint.url={folder}/checkpoints", "checkpoint.every=0"]
        for name, rates in LEARNING_RATES.items():
            runs = {}
            for rate in rates:
                arguments = [f"optim.name={name}", f"optim.lr={rate}", *places, *overrides]
                runs[rate] = run_json(raymuon("train", "demo", *arguments, "--json"))
                say(f"{name} at {rate:g}: validation loss {runs[rate]['val_loss']:.4f} nats per byte")
            best = best_rate({rate: run["val_loss"] for rate, run in runs.items()})
            found[name] = {"val_loss": {f"{rate:g}": run["val_loss"] for rate, run in runs.items()}, "best_lr": best}
            client = Tracking(TrackingConfig(uri=uri)).client
            drawn[f"{name}, lr {best:g}"] = tuple(
                [(m.step, m.value) for m in read_history(client, runs[best]["run_id"], metric)]
                for metric in ("loss", "val_loss")
            )
    plot_losses(drawn, picture)  # type: ignore[arg-type]
    return {**found, "picture": str(picture)}
