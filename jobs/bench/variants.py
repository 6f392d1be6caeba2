"""What the optimizer's settings do to the loss: each against the plain one, from several seeds, in one table.

A run is the demo's, shorter, as two ranks under torchrun. Runs of one seed begin with the same weights and see the same
text in the same order, so settings are compared within a seed; how far the seeds lie apart says what matters.
"""

import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.process import torchrun
from jobs.load import load, plain_yaml

SHORT = ["train.steps=150", "train.validate_every=0", "train.sample_prompt=''", "telemetry.every=0"]
PLAIN = ["optim.wire_dtype=fp32", "optim.ns_dtype=fp32", "optim.ns_form=auto"]
VARIANTS = {
    "plain: fp32 wire, fp32 quintic, adjusted lr": [],
    "bf16 wire": ["optim.wire_dtype=bf16"],
    "Newton-Schulz in bf16": ["optim.ns_dtype=bf16"],
    "standard form": ["optim.ns_form=standard"],
    "Gram form": ["optim.ns_form=gram"],
    "Polar Express": ["optim.ns_coefficients=polar_express"],
    "two-phase, 10 iterations": ["optim.ns_coefficients=two_phase", "optim.ns_steps=10"],
    "update norm": ["optim.rms_control=update_norm"],
}
WORLD_SIZE = 2


def variants(overrides: list[str], seeds: int, table: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Train every variant from every seed.

    Args:
        overrides: of the demo's config, for every run.
        seeds: runs of each variant.
        table: where a Markdown table goes, if anywhere.
        say: takes a line about each run.

    Returns:
        For each variant the validation losses at the end in nats per byte, their mean and standard deviation, and the
        mean and standard deviation of the differences to the plain one with the same seed.
    """
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="raymuon-variants-") as folder:
        for seed in range(seeds):
            for name, settings in VARIANTS.items():
                config = load("demo", [*SHORT, *PLAIN, *settings, f"seed={seed}", *overrides])
                path = Path(folder) / "config.yaml"
                path.write_text(plain_yaml(config))
                losses[name].append(torchrun(WORLD_SIZE, "jobs.bench.plain", path, f"{folder}/run")["val_loss"])
                say(f"seed {seed}, {name}: {losses[name][-1]:.4f} nats per byte")
    plain = next(iter(losses.values()))
    report = {
        name: {
            "val_loss": found,
            **_spread("val_loss", found),
            **_spread("difference", [mine - other for mine, other in zip(found, plain, strict=True)]),
        }
        for name, found in losses.items()
    }
    if table is not None:
        table.write_text(_markdown(report))
    return report


def _spread(name: str, values: list[float]) -> dict[str, float]:
    if not all(map(math.isfinite, values)):  # One has diverged: no number says how far they lie apart.
        return {f"{name}_mean": math.nan, f"{name}_std": math.nan}
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {f"{name}_mean": statistics.mean(values), f"{name}_std": deviation}


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "| variant | validation loss, nats per byte | difference to the plain one, same seed |",
        "| --- | --- | --- |",
    ]
    for name, found in report.items():
        loss = f"{found['val_loss_mean']:.4f} ± {found['val_loss_std']:.4f}"
        difference = f"{found['difference_mean']:+.4f} ± {found['difference_std']:.4f}"
        lines.append(f"| {name} | {loss} | {difference} |")
    return "\n".join(lines) + "\n"
