"""Conversations that every machine has: about the functions in Python source, with answers that are known.

A person asks what a function does and what it takes, and the assistant answers with its docstring's first paragraph and
its arguments. What comes of a file depends on the file alone.
"""

import ast
import warnings
from collections.abc import Iterator
from typing import Any

LONGEST = {"answer": 160, "arguments": 60}
"""Characters: a conversation has no more than 512 bytes."""
SYSTEM = "You answer about Python's functions."


def conversations(source: bytes) -> Iterator[list[dict[str, Any]]]:
    """Yield a conversation about each function of a file that says what it does; of what is no Python, nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Of what its author should not have written.
            parsed = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for function in _functions(parsed.body):
        answer = " ".join((ast.get_docstring(function) or "").partition("\n\n")[0].split())
        arguments = ", ".join(one.arg for one in function.args.args if one.arg not in ("self", "cls"))
        if not answer or len(answer) > LONGEST["answer"] or len(arguments) > LONGEST["arguments"]:
            continue
        turns = [(f"What does {function.name}({arguments}) do?", answer)]
        turns += [("What does it take?", arguments)] if arguments else []
        yield [{"role": "system", "content": SYSTEM}, *(message for turn in turns for message in _messages(*turn))]


def _functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a module and of its classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body)


def _messages(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
