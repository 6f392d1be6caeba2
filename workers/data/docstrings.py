"""Conversations that every machine has: about the functions in Python source, with answers that are known.

A person asks what a function does and what it takes, and the assistant answers with its docstring's first paragraph and
its arguments. What comes of a file depends on the file alone.
"""

import ast
import warnings
from collections.abc import Iterator
from typing import Any

LONGEST = 600
"""Characters of an answer."""
SYSTEM = "You answer about Python's functions."


def conversations(source: bytes) -> Iterator[list[dict[str, Any]]]:
    """Yield a conversation about each function of a file that says what it does; of what is no Python, nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Of what its author should not have written.
            parsed = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef) and (answer := _answer(node)):
            arguments = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
            turns = [(f"What does {node.name}({', '.join(arguments)}) do?", answer)]
            if arguments:
                turns.append(("What does it take?", ", ".join(arguments)))
            yield [{"role": "system", "content": SYSTEM}, *(message for turn in turns for message in _messages(*turn))]


def _answer(node: ast.FunctionDef) -> str:
    paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()) if len(paragraph) <= LONGEST else ""


def _messages(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
