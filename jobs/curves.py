"""Pictures of losses."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

Series = list[tuple[int, float]]


def plot_losses(runs: Mapping[str, tuple[Series, Series]], path: Path) -> None:
    """Draw training (thin) and validation (dots) losses of each run over its steps.

    Args:
        runs: label to training and validation losses, `(step, nats per byte)`.
        path: of the PNG.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (label, (training, validation)) in enumerate(runs.items()):
        color = f"C{index}"
        if training:
            axes.plot(*zip(*training, strict=True), color=color, linewidth=0.8, alpha=0.5)
        if validation:
            axes.plot(*zip(*validation, strict=True), color=color, marker="o", markersize=4, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_ylim(top=min(6.0, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title="dots: validation")
    figure.savefig(path, dpi=130)
