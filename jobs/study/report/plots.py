"""The plots of an answer as PNGs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from matplotlib import rc_context
from matplotlib.ticker import LogFormatter

from jobs.drawing import FAINT, as_it_is, name_lines, new_figure, save
from jobs.study.question import Curve, Plot

SIZE = (7.2, 4.6)
"""Inches."""
CONTEXT = "published, not measured here"
"""What a curve of others is labelled with."""
BAND = 0.18
"""How dense an interval is."""
PLAIN = 1e-3, 1e4
"""Numbers in between are written out on a logarithmic axis; beyond they are products with powers of ten."""
LABELS_INSIDE = 5
"""More of them would cover what they name."""
LOOKS: Mapping[str, Mapping[str, Any]] = {
    "line": {"marker": ""},
    "points": {"linestyle": "", "marker": "o"},
    "both": {"marker": "o"},
}
"""Of a curve's kinds."""
Point = tuple[float, float, float | None, float | None]
"""x, y, and the ends of y's interval."""


def draw(plot: Plot, path: Path | IO[bytes], style: Mapping[str, Any] = {}) -> None:
    """Draw a plot, as far as its axes can show it: see `left_out`.

    Args:
        plot: of an answer.
        path: of the PNG.
        style: matplotlib's settings.
    """
    with rc_context(style):  # type: ignore[arg-type]
        figure = new_figure(*SIZE)
        axes = figure.subplots()
        axes.set_xscale("log" if plot.log_x else "linear")
        axes.set_yscale("log" if plot.log_y else "linear")
        handles, own = [], 0
        for curve in plot.curves:
            handles.append(_draw_curve(axes, plot, curve, "0.55" if curve.context else f"C{own % 10}"))
            own += not curve.context
        for mark in plot.marks:
            axes.axhline(mark, color="0.5", linewidth=0.9, linestyle="--", zorder=0)
        for text in (axes.set_xlabel(plot.x), axes.set_ylabel(plot.y), axes.set_title(plot.title)):
            as_it_is(text)
            text.set_fontsize(10)
        for log, axis, ends in ((plot.log_x, axes.xaxis, axes.get_xlim()), (plot.log_y, axes.yaxis, axes.get_ylim())):
            if log and PLAIN[0] < ends[0] and ends[1] < PLAIN[1]:
                axis.set_major_formatter(_Plain())
                axis.set_minor_formatter(_Plain())
        axes.grid(alpha=FAINT, which="major")
        axes.tick_params(which="both", labelsize=8)
        if plot.names:
            axes.set_xlim(0.5, len(plot.names) + 0.5)
            axes.set_xticks(range(1, len(plot.names) + 1), plot.names, rotation=30, ha="right")
            for text in axes.get_xticklabels():
                as_it_is(text)
        if handles:
            outside = {"loc": "outside lower center", "ncols": 2} if len(handles) > LABELS_INSIDE else {}
            name_lines(figure if outside else axes, handles, fontsize=8, **outside)
        save(figure, path)


def left_out(plot: Plot) -> int:
    """Return how many points of a plot cannot be shown: not finite, or not above 0 on a logarithmic axis."""
    return sum(len(curve.x) - len(list(shown(plot, curve))) for curve in plot.curves)


def shown(plot: Plot, curve: Curve) -> Iterator[Point]:
    """Yield the points of a curve that the axes can show; an end of an interval that they cannot is None."""
    lows, highs = (ends or [None] * len(curve.x) for ends in (curve.low, curve.high))
    for x, y, low, high in zip(curve.x, curve.y, lows, highs, strict=True):
        if _fits(x, plot.log_x) and _fits(y, plot.log_y):
            yield x, y, low if _fits(low, plot.log_y) else None, high if _fits(high, plot.log_y) else None


def label_of(curve: Curve) -> str:
    """Return what a curve is called: one of others says so."""
    return f"{curve.label} ({CONTEXT})" if curve.context else curve.label


class _Plain(LogFormatter):
    """Writes the numbers out that others write with powers of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _fits(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _draw_curve(axes: Any, plot: Plot, curve: Curve, color: str) -> Any:
    points = list(shown(plot, curve))
    look = dict(LOOKS[curve.kind])
    if curve.context and curve.kind != "points":
        look |= {"linestyle": ":", "marker": "x" if curve.kind == "both" else ""}
    x, y = [one[0] for one in points], [one[1] for one in points]
    (line,) = axes.plot(x, y, color=color, linewidth=1.3, markersize=4, **look)
    line.set_label(label_of(curve))
    _draw_intervals(axes, points, curve.kind, color)
    return line


def _draw_intervals(axes: Any, points: Sequence[Point], kind: str, color: str) -> None:
    """Draw bars on points and bands along lines; a line of few points has bars, too."""
    known = [(x, y, low, high) for x, y, low, high in points if low is not None and high is not None]
    if not known:
        return
    x, y, low, high = (list(one) for one in zip(*known, strict=True))
    if kind == "line":
        axes.fill_between(x, low, high, color=color, alpha=BAND, linewidth=0)
    else:  # A bootstrap's interval need not have its value in it, and no bar is negative.
        below = [max(0.0, value - end) for value, end in zip(y, low, strict=True)]
        above = [max(0.0, end - value) for value, end in zip(y, high, strict=True)]
        axes.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=color, elinewidth=1, capsize=3, alpha=0.8)
