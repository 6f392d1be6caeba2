"""The matrices of a model whose spectra are looked at, and the spectra of some of them, read out of a checkpoint.

A piece of work is a slice of one parameter, so whoever does it has no more of a checkpoint in memory than that.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from optim.layout import Fragment
from optim.spectra import entropy, singular_values
from workers.checkpoint.manifest import WEIGHT, Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.common.storage import Store
from workers.config import ModelConfig
from workers.models import build_empty
from workers.models.language_model import LanguageModel

PIECE = 1 << 24
"""Elements of a piece, at most, but for a matrix that has more: 64 MiB in fp32."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter of `count` matrices `[rows, columns]`: one, or as many as there are experts."""

    name: str
    kind: str
    """One of MATRICES."""
    layer: int | None
    """Counted from 0; None of what is in no layer."""
    count: int
    rows: int
    columns: int
    parts: tuple[int, ...] = ()
    """Rows of each matrix of its own within each; empty where it is one."""

    def pieces(self) -> "Iterator[Piece]":
        """Cut it into pieces of whole matrices."""
        step = max(1, PIECE // (self.rows * self.columns))
        for first in range(0, self.count, step):
            yield Piece(self, first, min(first + step, self.count))


@dataclass(frozen=True, slots=True)
class Piece:
    """Matrices `first` to `last` of a stack."""

    stack: Stack
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one matrix."""

    name: str
    """Of its parameter."""
    kind: str
    layer: int | None
    expert: int | None
    """Its place in a stack; None of a parameter that is a matrix."""
    part: int | None
    """Its place within a parameter that is split; None where it is not."""
    rows: int
    columns: int
    entropy: float | None
    """0 to 1 (`optim.spectra.entropy`); None where the matrix is not finite, and so below."""
    largest: float | None
    median: float | None
    smallest: float | None
    values: np.ndarray | None
    """All singular values, fp64, the largest first."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Where a checkpoint is read: what its run log says of its manifest."""

    run_url: str
    s3_endpoint: str
    path: str
    sha256: str


def stacks_of(config: ModelConfig, kinds: Collection[str], split: str = "none") -> list[Stack]:
    """Return the parameters of these kinds, in the model's order.

    Args:
        config: of the model.
        kinds: some of MATRICES.
        split: what is a matrix of its own within a parameter, as `optim.split` says.
    """
    with torch.device("meta"):
        model = build_empty(config)
    kind_of, layers, parts = model.parameter_kinds(), _layers(model), model.matrix_parts(split)
    return [
        Stack(name, kind_of[name], layers.get(name), *_matrices(parameter), parts.get(name, ()))
        for name, parameter in model.named_parameters()
        if kind_of[name] in kinds and parameter.numel()
    ]


def _layers(model: LanguageModel) -> dict[str, int]:
    """Return the number of the block in which each parameter lies."""
    number = {id(parameter): index for index, block in enumerate(model.blocks) for parameter in block.parameters()}
    return {name: number[id(one)] for name, one in model.named_parameters() if id(one) in number}


def _matrices(parameter: torch.Tensor) -> tuple[int, int, int]:
    rows, columns = parameter.shape[-2:]
    return parameter.numel() // (rows * columns), rows, columns


def spectra_of(saved: Sequence[Saved], work: tuple[int, Piece]) -> list[Spectrum]:
    """Read a piece of a checkpoint and return the spectra of its matrices; on a GPU where the process has one.

    Args:
        saved: the checkpoints.
        work: the number of one of them, and what of it.

    Raises:
        StorageError: it is damaged or missing, or storage does not answer.
    """
    number, piece = work
    stack, device = piece.stack, "cuda" if torch.cuda.is_available() else "cpu"
    size = stack.rows * stack.columns
    flat = np.empty((piece.last - piece.first) * size, dtype=np.float32)
    _reader(saved[number]).fill(WEIGHT, [Fragment(stack.name, piece.first * size, flat.size, 0)], flat)
    found = []
    for index, matrix in enumerate(torch.from_numpy(flat).view(-1, stack.rows, stack.columns), piece.first):
        expert = index if stack.count > 1 else None
        for part, rows in enumerate(matrix.to(device).split(stack.parts or (stack.rows,))):
            found.append(_spectrum(stack, expert, part if stack.parts else None, rows))
    return found


def _spectrum(stack: Stack, expert: int | None, part: int | None, matrix: torch.Tensor) -> Spectrum:
    rows, columns = matrix.shape
    about = (stack.name, stack.kind, stack.layer, expert, part, rows, columns)
    if (values := singular_values(matrix)) is None:
        return Spectrum(*about, None, None, None, None, None)
    found = values.cpu().numpy()
    median = float(np.median(found))
    return Spectrum(*about, entropy(values.square()), float(found[0]), median, float(found[-1]), found)


@lru_cache(maxsize=2)
def _reader(saved: Saved) -> CheckpointReader:
    """Return a reader; a process does many pieces of one checkpoint, and a manifest of a thousand ranks is large."""
    store = Store(saved.run_url, saved.s3_endpoint)
    return CheckpointReader(store, Manifest.read(store, saved.path, saved.sha256))
