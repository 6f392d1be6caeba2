"""The documents of the tasks that raymuon ships: made of Python's own standard library, so that they need no network.

They come from the end of each file that a run on `python-stdlib` holds out of training, if it holds out as much as the
default config. The same Python has the same documents.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import datasets

from workers.data.config import DataConfig
from workers.data.files import STDLIB, files_of

SHORTEST = 400
"""Bytes of an end of a file out of which documents are made."""
LONGEST = 1_000
"""Bytes of a document."""
CONTEXT = 160
"""Letters before what is asked for."""
DOCUMENTS = 200
"""Of a task, at most."""
LINE = re.compile(r"(?=.{12,40}$)\s*\S.{8,}\S")
"""A line that is not like all others, and fits into a small model's context."""
CLOSED = re.compile(r"(.*[^\s()\[\]{}:,])([)\]}]+:?)")
"""A line that ends with closing brackets, and what is before them."""


def continuations(**_: Any) -> dict[str, datasets.Dataset]:
    """Return contexts with four lines each, one of which comes next; the others do elsewhere."""
    found = [one for name, lines in _ends() if (one := next(_followed(name, lines), None))]
    found = list({line: (name, before, line) for name, before, line in found}.values())[:DOCUMENTS]
    rows = []
    for number, (name, before, line) in enumerate(found):
        others = [found[(number + step) % len(found)][2] for step in (7, 19, 41)]
        answer = hashlib.sha256(name.encode()).digest()[0] % 4
        rows.append({"context": before, "choices": [*others[:answer], line, *others[answer:]], "answer": answer})
    return {"test": datasets.Dataset.from_list(rows)}


def texts(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the ends themselves."""
    rows = [{"text": "\n".join(lines)[:LONGEST]} for _, lines in _ends()]
    return {"test": datasets.Dataset.from_list(rows[:: -(-len(rows) // DOCUMENTS)])}


def brackets(**_: Any) -> dict[str, datasets.Dataset]:
    """Return contexts that stop before the closing brackets with which their last line ends."""
    rows = [row for _, lines in _ends() for row in _closed(lines)]
    return {"test": datasets.Dataset.from_list(rows[:: -(-len(rows) // DOCUMENTS)])}


@cache
def _ends() -> list[tuple[str, list[str]]]:
    """Return the name of each file of which enough is held out, and the whole lines of that."""
    found = []
    for system, name in files_of(STDLIB):
        text = bytes(system.cat_file(name))  # type: ignore[arg-type]
        held_out = text[len(text) - round(len(text) * DataConfig().held_out_fraction) :]
        if len(held_out) >= SHORTEST:
            found.append((name.rpartition("/")[2], held_out.decode(errors="ignore").split("\n")[1:]))
    return found


def _followed(name: str, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for number in range(len(lines) // 2, len(lines)):
        if LINE.fullmatch(lines[number]):
            yield name, _before(lines[:number]), lines[number]


def _closed(lines: list[str]) -> Iterator[dict[str, str]]:
    for number in range(3, len(lines)):
        if found := CLOSED.fullmatch(lines[number]):
            yield {"context": _before(lines[:number]) + found[1], "closing": found[2]}


def _before(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)[-CONTEXT:]
