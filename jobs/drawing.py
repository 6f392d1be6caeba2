"""How all pictures look and are written: names of anybody's are shown as they are, and nobody is told of fonts."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from workers.common.text import visible

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It tells of caches and fonts, which nobody can mend here.
DOTS = 130
"""Per inch."""
FAINT = 0.3
"""Of a grid."""
DARK = {
    "figure.facecolor": "#16181d",
    "axes.facecolor": "#16181d",
    "savefig.facecolor": "#16181d",
    "legend.facecolor": "#16181d",
    "text.color": "#e6e6e6",
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": "#e6e6e6",
    "xtick.color": "#c9ccd1",
    "ytick.color": "#c9ccd1",
    "legend.edgecolor": "#4a4f57",
}
"""Of matplotlib's settings, for a page that is dark."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, of no window and of no other thread."""
    return Figure(figsize=(width, height), layout="constrained")


def name_lines(owner: Any, lines: Sequence[Any], **options: Any) -> None:
    """Put a legend on axes or a figure, with the lines' labels as they are."""
    legend = owner.legend(lines, [str(line.get_label()) for line in lines], **options)
    for text in (*legend.get_texts(), legend.get_title()):
        as_it_is(text)


def as_it_is(text: Any) -> None:
    """Have a text of a figure shown without steering characters, and not read as a formula."""
    text.set_text(visible(text.get_text()))
    text.set_parse_math(False)


def save(figure: Figure, path: Path | IO[bytes], style: Mapping[str, Any] = {}) -> None:
    """Write a figure as a PNG, the same bytes for the same figure."""
    with warnings.catch_warnings(), rc_context(style):  # type: ignore[arg-type]
        warnings.filterwarnings("ignore", message="Glyph")  # The picture shows a box in its place.
        figure.savefig(path, dpi=DOTS, format="png")
