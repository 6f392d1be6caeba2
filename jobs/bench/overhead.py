"""What the orchestration costs: raymuon against plain torchrun, in turns, on the same model, data and engine.

Tokens per second are counted from the end of the first steps to the end of the last, on rank 0's clock, so start-up is
left out on both sides. An idle Ray cluster takes a few percent of two cores by itself: it is up during both arms of
`ratio`, and down for the rival of `ratio_bare`.
"""

import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray

from jobs.bench.process import raymuon, run_json, torchrun
from jobs.load import load, plain_yaml
from orchestrator.config import RunConfig, TrackingConfig
from orchestrator.group.cluster import connected
from orchestrator.record.metrics import read_history
from orchestrator.stop import StopSignal
from workers.common.errors import ClusterError

WARMUP_STEPS = 10


def overhead(overrides: list[str], repeats: int, say: Any) -> dict[str, Any]:
    """Measure `repeats` rounds of three arms and return tokens/s, their medians and the ratios of each round.

    Args:
        overrides: of the demo's config.
        repeats: rounds.
        say: takes a line about each arm.
    """
    arms: dict[str, list[float]] = {"raymuon": [], "torchrun": [], "torchrun_bare": []}
    with tempfile.TemporaryDirectory(prefix="raymuon-overhead-") as folder:
        fixed = [
            "train.validate_every=0",
            "train.sample_prompt=''",
            "checkpoint.every=0",
            f"checkpoint.url={folder}/checkpoints",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
        ]
        config = load("demo", ["train.steps=80", *fixed, *overrides])
        path = Path(folder) / "config.yaml"
        path.write_text(plain_yaml(config))
        for round_ in range(repeats):
            # In turns, and in another order every round: the machine's speed drifts.
            for arm in list(arms)[:: -1 if round_ % 2 else 1]:
                with nullcontext() if arm == "torchrun_bare" else connected("local", StopSignal()):
                    speed = _raymuon(path, config) if arm == "raymuon" else _torchrun(path, config, folder)
                arms[arm].append(speed)
                say(f"round {round_ + 1}, {arm}: {speed:,.0f} tokens/s")
    ratios = [a / b for a, b in zip(arms["raymuon"], arms["torchrun"], strict=True)]
    bare = [a / b for a, b in zip(arms["raymuon"], arms["torchrun_bare"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_bare": statistics.median(bare),
        "ratios": ratios,
        "ratios_bare": bare,
        "tokens_per_second": {arm: statistics.median(speeds) for arm, speeds in arms.items()},
        "world_size": config.scaling.max_workers,
        "steps": config.train.steps - WARMUP_STEPS,
    }


def _raymuon(path: Path, config: RunConfig) -> float:
    """Train on the cluster that this process has started."""
    from orchestrator.record.tracking import Tracking

    address = ray.get_runtime_context().gcs_address
    result = run_json(raymuon("train", str(path), "--address", address, "--json"))
    if result["world_size"] != config.scaling.max_workers:
        raise ClusterError(f"{result['world_size']} worker(s) instead of {config.scaling.max_workers}: no comparison")
    client = Tracking(TrackingConfig(uri=config.tracking.uri)).client
    history = read_history(client, result["run_id"], "loss")
    return _speed([m.timestamp / 1000 for m in history], config)


def _torchrun(path: Path, config: RunConfig, folder: str) -> float:
    result = torchrun(config.scaling.max_workers, "jobs.bench.plain", path, f"{folder}/plain")
    return _speed(result["times"], config)


def _speed(times: list[float], config: RunConfig) -> float:
    steps = len(times) - WARMUP_STEPS
    return steps * config.train.global_batch * config.train.seq_len / (times[-1] - times[WARMUP_STEPS - 1])
