"""The terminal: every text that a person sees goes through here, and is shown as it is.

Paths, names, samples and errors are not ours: a folder `[a]` is no markup, and an escape sequence moves no cursor.
Lines are broken by the terminal and not by us, so that paths and commands can be copied, and are whole in a pipe.
"""

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.text import Text

from workers.common.text import visible

MLFLOW_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` listens."""


class Screen(Console):
    """Rich's console without markup, highlighting and emoji codes; texts, in tables too, have no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Make a text of ours or of anybody's what rich shows."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:  # type: ignore[override]
        """Let rich's own control codes through, and none that is in a text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:  # type: ignore[override]
        """Print texts in lines that are not broken, and tables as wide as the terminal."""
        if soft_wrap is None:
            soft_wrap = all(isinstance(one, str) for one in objects)
        super().print(*objects, soft_wrap=soft_wrap, **options)


def command(program: str, *arguments: str) -> str:
    """Return a command that a shell in this folder takes: of a program beside this Python, with its path if need be."""
    ours = Path(sys.executable).with_name(program)
    if shutil.which(program) != str(ours) and ours.exists():
        program = str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)
    return shlex.join([program, *arguments])


def mlflow_page(tracking_uri: str, path: str) -> str:
    """Say how to open a page of MLflow: at a server its URL, of a database with the command that shows it."""
    if tracking_uri.startswith("http"):
        return f"{tracking_uri.rstrip('/')}/{path}"
    # Quoted for the shell: a URL of a page has ? and &.
    return f"{command('mlflow', 'ui', '--backend-store-uri', tracking_uri)}\n{'':12}{MLFLOW_UI}/{path}"
