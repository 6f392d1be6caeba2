"""How well a study uses the machine: wall time of equal short trials over what their steps alone would take."""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.bench.process import ALIKE, raymuon, run_json
from jobs.load import as_yaml, parsed

SIZES = {"model.hidden_size": 64, "model.num_layers": 3, "model.num_heads": 4, "model.intermediate_size": 176}
RATES = (8e-3, 1.6e-2)


def study(overrides: list[str], trials: int, steps: int, slots: int, say: Any) -> dict[str, Any]:
    """Run a study of equal trials.

    Args:
        overrides: of the trials' config.
        trials: how many, an even number.
        steps: of each.
        slots: trials at a time; the machine should have as many idle cores.
        say: takes a line about what is done.

    Returns:
        `over_steps`: wall time from the first trial's beginning to the last one's end, over the time of all steps
        shared out over the slots; `command_over_steps` has the start of Ray and the report in the wall time, too.
    """
    settings = {
        **SIZES,
        "train.steps": steps,
        "train.validate_every": 0,
        "train.sample_prompt": "",
        "checkpoint.every": 0,
        **dict(map(parsed, overrides)),
    }
    file = {
        "name": "bench",
        "base": "demo-llama",
        "settings": settings,
        "axes": {"optim.lr": [*RATES]},
        "seeds": [*range(trials // len(RATES))],
        "question": {"name": "ablation"},
    }
    with tempfile.TemporaryDirectory(prefix="raymuon-bench-") as folder:
        Path(folder, "study.yaml").write_text(as_yaml(file))
        environment = {**ALIKE, "RAY_ADDRESS": "local", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        command = raymuon("study", "run", "study.yaml", "--at-once", str(slots), "--json")
        say(f"{trials} trials of {steps} steps, {slots} at a time")
        began, load = time.monotonic(), os.getloadavg()[0]
        told = run_json(command, Path(folder), **environment)
        whole = time.monotonic() - began
        wall = _wall(environment["MLFLOW_TRACKING_URI"], told["run_id"])
    seconds = [one["seconds"] for one in told["trials"].values()]
    ideal = sum(seconds) / slots
    return {
        "trials": len(seconds),
        "slots": slots,
        "seconds_per_trial": round(statistics.median(seconds), 2),
        "wall_s": round(wall, 2),
        "command_s": round(whole, 2),
        "over_steps": round(wall / ideal, 3),
        "command_over_steps": round(whole / ideal, 3),
        "load_before": round(load, 2),
    }


def _wall(uri: str, run_id: str) -> float:
    """Return the seconds from the first trial's beginning to the last one's end."""
    from orchestrator.record.mlflow_client import open_client  # MLflow takes seconds to import.

    client = open_client(uri)
    experiment = client.get_run(run_id).info.experiment_id
    runs = client.search_runs([experiment], f'tags.`mlflow.parentRunId` = "{run_id}"')
    return (max(run.info.end_time or 0 for run in runs) - min(run.info.start_time for run in runs)) / 1000
