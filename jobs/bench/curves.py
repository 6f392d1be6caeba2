"""Muon against AdamW on the demo, each at its own best of three learning rates, in one picture."""

import tempfile
from pathlib import Path
from typing import Any

from jobs.bench.process import raymuon, run_json
from jobs.curves import plot_losses
from orchestrator.config import TrackingConfig

LEARNING_RATES = {"muon": (0.8e-2, 1.6e-2, 3.2e-2), "adamw": (1.5e-3, 3e-3, 6e-3)}


def curves(picture: Path, overrides: list[str], say: Any) -> dict[str, Any]:
    """Train every optimizer at every rate and draw each one's best run.

    Args:
        picture: path of the PNG.
        overrides: for every run.
        say: takes a line about each run.

    Returns:
        For each optimizer the validation loss by learning rate, and the best rate.
    """
    from orchestrator.tracking import Tracking

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
            best = min(runs, key=lambda rate: runs[rate]["val_loss"])
            found[name] = {"val_loss": {f"{rate:g}": run["val_loss"] for rate, run in runs.items()}, "best_lr": best}
            client = Tracking(TrackingConfig(uri=uri)).client
            drawn[f"{name}, lr {best:g}"] = tuple(
                [(m.step, m.value) for m in client.get_metric_history(runs[best]["run_id"], metric)]
                for metric in ("loss", "val_loss")
            )
    plot_losses(drawn, picture)  # type: ignore[arg-type]
    return {**found, "picture": str(picture)}
