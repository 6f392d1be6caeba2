"""What `raymuon study spectrum` leaves behind: tables of all matrices, and pictures of their groups."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from jobs.drawing import FAINT, name_lines, new_figure, save
from jobs.study.spectra import Measured
from workers.spectra import Spectrum

HEAD = ("run", "step", "tokens", "group", "layer", "parameter", "expert", "part", "rows", "columns")
MATRICES_CSV, VALUES_CSV = "matrices.csv", "singular_values.csv"
PANEL = (3.6, 2.7)
"""Inches of a group's picture."""
COLUMNS = 3
Line = tuple[Sequence[float], Sequence[float]]


def write_tables(folder: Path, series: Sequence[Sequence[Measured]]) -> None:
    """Write a row for each matrix of each checkpoint, and the singular values of each subject's last one.

    Numbers are written so that reading them gives the same ones, values to nine digits. A matrix that is not finite has
    empty cells.
    """
    everything = [measured for one in series for measured in one]
    own = ("entropy", "largest", "median", "smallest")
    rows = (
        (*_about(measured, spectrum), *(getattr(spectrum, name) for name in own))
        for measured in everything
        for spectrum in measured.spectra
    )
    _write(folder / MATRICES_CSV, (*HEAD, *own), rows)
    values = (
        (*_about(one[-1], spectrum), "" if spectrum.values is None else " ".join(f"{s:.9g}" for s in spectrum.values))
        for one in series
        for spectrum in one[-1].spectra
    )
    _write(folder / VALUES_CSV, (*HEAD, "singular_values"), values)


def _about(measured: Measured, spectrum: Spectrum) -> tuple:
    of_run = (measured.label, measured.step, measured.tokens, spectrum.kind, spectrum.layer, spectrum.name)
    return (*of_run, spectrum.expert, spectrum.part, spectrum.rows, spectrum.columns)


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def draw_series(path: Path, series: Sequence[Sequence[Measured]]) -> None:
    """Draw the mean entropy of each group over the steps of each subject."""

    def lines(group: str) -> Iterator[tuple[str, Line]]:
        for one in series:
            yield one[-1].label, _line((measured.step, measured.means[group].entropy) for measured in one)

    _draw(path, _groups(series), lines, "step", "SVD entropy", marker="o", markersize=3)


def draw_layers(path: Path, series: Sequence[Sequence[Measured]]) -> None:
    """Draw the mean entropy of each group in each layer, at the last checkpoint of each subject."""

    def lines(group: str) -> Iterator[tuple[str, Line]]:
        for one in series:
            means = one[-1].by_layer
            yield one[-1].label, _line((layer, mean.entropy) for (kind, layer), mean in means.items() if kind == group)

    _draw(path, _groups(series), lines, "layer", "SVD entropy", marker="o", markersize=3)


def draw_values(path: Path, series: Sequence[Sequence[Measured]]) -> None:
    """Draw the singular values over their root mean square, averaged over each group's matrices by their place.

    The place is a share of all, from the largest on the left: matrices of a group may have other sizes.
    """

    def lines(group: str) -> Iterator[tuple[str, Line]]:
        for one in series:
            yield one[-1].label, _mean_values([spectrum for spectrum in one[-1].spectra if spectrum.kind == group])

    _draw(path, _groups(series), lines, "share of all singular values", "over their RMS", logarithmic=True)


def _mean_values(spectra: Sequence[Spectrum]) -> Line:
    places = np.linspace(0, 1, 101)
    relative = [
        np.interp(places, np.linspace(0, 1, len(values)), values / rms)
        for values in (spectrum.values for spectrum in spectra)
        if values is not None and (rms := np.sqrt(np.mean(np.square(values)))) > 0
    ]
    return (places.tolist(), np.mean(relative, axis=0).tolist()) if relative else ([], [])


def _line(points: Iterable[tuple[float, float | None]]) -> Line:
    known = sorted((x, y) for x, y in points if y is not None)
    return [x for x, _ in known], [y for _, y in known]


def _groups(series: Sequence[Sequence[Measured]]) -> list[str]:
    return list(series[0][-1].means)


def _draw(
    path: Path,
    groups: Sequence[str],
    lines: Callable[[str], Iterable[tuple[str, Line]]],
    x: str,
    y: str,
    logarithmic: bool = False,
    **style: Any,
) -> None:
    """Draw a panel for each group, a line in it for each subject."""
    columns = min(COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    figure = new_figure(columns * PANEL[0], rows * PANEL[1] + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: list[Any] = []
    for axes, group in zip(panels, groups, strict=False):
        drawn = [axes.plot(*line, label=label, linewidth=1.2, **style)[0] for label, line in lines(group)]
        handles = handles or drawn
        axes.set_title(group, fontsize=10)
        axes.set_xlabel(x, fontsize=8)
        axes.set_ylabel(y, fontsize=8)
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=FAINT)
        if logarithmic:
            axes.set_yscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(groups) :]:
        axes.remove()
    name_lines(figure, handles, loc="outside upper center", ncols=4, fontsize=9)
    save(figure, path)
