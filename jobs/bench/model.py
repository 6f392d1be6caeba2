"""How fast the models compute: training steps against transformers' models of the same configs, weights and batch.

Both sides take the same steps (forward, loss, backward, AdamW) in turns in one process of one thread, plain and
compiled. transformers' side is the fastest of the ways that it has. What a mixture of experts costs over a dense model
is measured beside it, with our code on both sides.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.process import ALIKE, python, run_json
from jobs.load import load, plain_yaml
from workers.common.errors import ConfigError

CONFIGS = ("demo", "demo-llama")


def model(overrides: list[str], rounds: int, only: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure both configs, or `only` one.

    Args:
        overrides: of the configs, for instance train.seq_len=512.
        rounds: counted steps of each model.
        only: a config by name; empty for all.
        say: takes a line about each config.

    Raises:
        ConfigError: there is no such config, or transformers is not installed.
        TrainingError: the losses of both sides differ, or a measurement failed.
    """
    if only and only not in CONFIGS:
        raise ConfigError(f"--only {only}: must be one of {', '.join(CONFIGS)}")
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("raymuon bench model compares with transformers: pip install 'raymuon[dev]'")
    reports = {}
    for name in [only] if only else CONFIGS:
        with tempfile.TemporaryDirectory(prefix="raymuon-model-") as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(plain_yaml(load(name, overrides)))
            offline = {"HF_HUB_OFFLINE": "1"}
            found = run_json(python("jobs.bench.model_step", str(path), str(rounds), folder), **ALIKE, **offline)
        reports[name] = found
        say(
            f"{name}: " + ", ".join(f"{who} {speed:,.0f} tokens/s" for who, speed in found["tokens_per_second"].items())
        )
    return {**summary(reports), "configs": reports, "rounds": rounds}


def summary(reports: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return what counts of each config's figures: the smaller ratios, and the larger price of a mixture."""
    worse = {"ratio_to_transformers": min, "ratio_compiled": min, "moe_over_dense": max}
    found = {key: [report[key] for report in reports.values() if key in report] for key in worse}
    return {key: worse[key](figures) for key, figures in found.items() if figures}
