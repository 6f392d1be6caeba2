"""Pictures of losses."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.drawing import FAINT, name_lines, new_figure, save
from orchestrator.record.events import Recovery

Series = list[tuple[int, float]]
BEGINNING = 0.1
"""Share of the steps whose losses may lie above the picture: all runs fall alike from what chance gives."""
MARGIN = 0.05
"""Of the height, above and below."""


def plot_losses(runs: Mapping[str, tuple[Series, Series]], path: Path, changes: Sequence[Recovery] = ()) -> None:
    """Draw training (thin) and validation (dots) losses of each run over its steps.

    Args:
        runs: label to training and validation losses, `(step, nats per token)`.
        path: of the PNG.
        changes: of the group of workers (`RunResult.changes`): a line at each, red after a fault, with the new size.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    labelled = []
    for index, (label, (training, validation)) in enumerate(runs.items()):
        color = f"C{index}"
        if training:
            axes.plot(*zip(*training, strict=True), color=color, linewidth=0.8, alpha=0.5)
        if validation:
            labelled += axes.plot(*zip(*validation, strict=True), color=color, marker="o", markersize=4)
            labelled[-1].set_label(label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if limits := height([point for series in runs.values() for one in series for point in one]):
        axes.set_ylim(*limits)
    _mark(axes, changes)
    axes.grid(alpha=FAINT)
    if labelled:
        name_lines(axes, labelled, title="dots: validation")
    save(figure, path)


def height(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """Return the lowest and the highest loss of a picture: where runs differ, and not what the first steps have.

    Args:
        points: `(step, loss)` of all runs, training and validation.

    Returns:
        None where there is nothing to see.
    """
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not finite:
        return None
    begins = BEGINNING * max(step for step, _ in finite)
    low = min(loss for _, loss in finite)
    high = max(loss for step, loss in finite if step >= begins)
    margin = MARGIN * (high - low) or 0.05
    return low - margin, high + margin


def _mark(axes: Any, changes: Sequence[Recovery]) -> None:
    for change in changes:
        color = "C3" if change.reason == "fault" else "0.5"
        workers = f"{change.world_size} worker{'s' if change.world_size > 1 else ''}"
        axes.axvline(change.step, color=color, linestyle=":", linewidth=1)
        axes.annotate(
            f"{change.reason}, {workers}",
            (change.step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-2, -4),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=7,
            color=color,
        )
