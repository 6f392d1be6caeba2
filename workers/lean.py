"""DeepSpeed, imported without what nobody here uses: that takes longer than all the rest of it.

Invariant: DeepSpeed does what it would do, in as many words. What is left out is MLflow, which its autotuner looks for,
and torch's compiler, which its own Muon calls at import: 2.5 s of a processor, on every worker, when all wait for the
first step. The functions of that Muon are there, uncompiled.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")
"""Torch's compiler: what takes long to import of it."""


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Have MLflow taken for not installed: for a worker it would be a second and a half of imports."""
    found = sys.modules.get("mlflow")
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]
        if found is not None:
            sys.modules["mlflow"] = found


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Have torch taken for one that cannot compile, as DeepSpeed itself does where it is too old."""
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    made, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator  # type: ignore[attr-defined]
    try:
        yield
    finally:
        compiler.compile = made  # type: ignore[attr-defined]


def import_compiler() -> None:
    """Import torch's compiler, where it will be needed and nobody waits yet."""
    for name in COMPILER:
        importlib.import_module(name)


with _without_mlflow():
    import deepspeed
    from deepspeed.utils import groups
with _without_compiling():
    # `deepspeed.initialize` imports it to find out whether an optimizer is one.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")

__all__ = ["deepspeed", "groups", "import_compiler"]
