"""How tables are printed: every cell whole, in a terminal of 80 columns and in a pipe as in a wide one.

rich cuts a table to the console's width, which is 80 where there is no terminal: paths and ids lost their ends.
"""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from jobs.screen import Screen

WIDEST = 1_000_000
"""Columns; no table is wider."""


def print_table(
    console: Screen, head: Sequence[str], rows: Iterable[Sequence[str | Text]], title: str = "", wrap: bool = False
) -> None:
    """Print a table as wide as its cells are; the terminal breaks what is wider than it.

    Args:
        console: to print on.
        head: of the columns.
        rows: cells, which are no markup.
        title: a line above it; empty for none.
        wrap: in a terminal, break the last column between words, never within one.
    """
    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in table.columns[: -1 if wrap else None]:
        column.no_wrap = True
    table.columns[-1].overflow = "fold"  # No word is longer than the width.
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    least, most = Measurement.get(console, console.options.update(width=WIDEST), table)
    width = max(least, min(most, console.width)) if wrap and console.is_terminal else most
    if title:
        console.print(Text(f"\n{title}"), soft_wrap=True)
    console.print(Segments(console.render(table, console.options.update(width=width))), crop=False, end="")
