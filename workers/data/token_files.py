"""Files of tokens that others have made: Megatron's `.bin` with its `.idx`, and numpy's `.npy`.

Only ranges of them are read, and no id outside of the vocabulary gets through.

Megatron-LM's index (`megatron/core/datasets/indexed_dataset.py`; tried with files that Megatron Core 0.16.1 wrote), all
little-endian: 9 bytes `MMIDIDX`, 0, 0; uint64 version, 1; uint8 code of the tokens' type; uint64 number of sequences n;
uint64 number of document borders m; n int32 lengths in tokens; n int64 places in the `.bin`, in bytes; m int64 borders
of the documents, in sequences, from 0 to n. With images, n int8 modes follow. The `.bin` has nothing but the tokens.
The format of `.npy` is numpy's (NEP 1).
"""

import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib import format as npy

from workers.common.text import visible
from workers.data.lines import Unreadable
from workers.data.pieces import PIECE_BYTES, Piece, Source, even_cuts, source_of

BLOCK_TOKENS = 2**20
"""Of a file without documents, at a time."""
DOCUMENTS = 2**14
"""Whose places are held at a time."""
MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 6: "<f8", 7: "<f4"}


def token_documents(piece: Piece, vocab_size: int, bad: Callable[[str], None]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the token ids of each document of a piece, and its number in the piece from 1; empty ones are left out.

    An `.npy` has no documents: its blocks have number 0, and each goes on where the one before has ended.

    Args:
        piece: of the format megatron or npy.
        vocab_size: all ids are below it.
        bad: is told of each document that cannot be read, and each block of a file without documents, and why.

    Raises:
        StorageError: the file cannot be read.
    """

    def tell(why: object) -> None:
        bad(f"{visible(piece.url)}: {why}")

    if piece.wrong:
        tell(piece.wrong)
        return
    try:
        yield from (_megatron if piece.format == "megatron" else _npy)(piece, vocab_size, tell)
    except Unreadable as error:
        tell(error)


def npy_cuts(source: Source, size: int) -> list[tuple[int, int, int]]:
    """Return the pieces of an `.npy` file: tokens from and to, and their bytes.

    Raises:
        Unreadable: there are no tokens in it, or not all.
    """
    kind, count, begin = _npy_header(source)
    if size and size != (wanted := begin + count * kind.itemsize):
        raise Unreadable(f"its header promises {count:,} tokens of {kind}, {wanted:,} bytes, but it has {size:,}")
    step = PIECE_BYTES // kind.itemsize
    ends = [*range(0, count, step), count]
    return [(a, b, (b - a) * kind.itemsize) for a, b in itertools.pairwise(ends)]


def _npy(piece: Piece, vocab_size: int, tell: Callable[[object], None]) -> Iterator[tuple[np.ndarray, int]]:
    with source_of(piece) as source:
        kind, count, begin = _npy_header(source)
        stop = count if piece.stop < 0 else piece.stop
        source.seek(begin + piece.start * kind.itemsize)
        for first in range(piece.start, stop, BLOCK_TOKENS):
            ids = _ids(source, kind, min(BLOCK_TOKENS, stop - first))
            if why := _outside(ids, vocab_size, first):
                tell(f"{why}; the {len(ids):,} tokens from token {first} on are left out")
            else:
                yield ids, 0


def _npy_header(source: Source) -> tuple[np.dtype, int, int]:
    """Return the type of the tokens, their number, and where they begin."""
    source.seek(0)
    try:
        version = npy.read_magic(source)  # type: ignore[arg-type]
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, kind = read(source)  # type: ignore[arg-type]
    except ValueError as error:
        raise Unreadable(f"the header of its numpy array is damaged ({error})") from error
    if kind.kind not in "iu":
        what = "Python objects, which are never read" if kind.hasobject else f"{kind}"
        raise Unreadable(f"it holds {what}, not token ids: uint16, uint32, int32 or int64")
    if len(shape) != 1:
        raise Unreadable(f"its array has the shape {shape}; token ids have one dimension")
    return kind, shape[0], source.tell()


@dataclass(frozen=True)
class _Index:
    kind: np.dtype
    sequences: int
    borders: int
    source: Source

    @classmethod
    def read(cls, source: Source) -> "_Index":
        source.seek(0)
        head = source.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise Unreadable("its .idx does not begin as a Megatron index does")
        _, version, code, sequences, borders = _HEADER.unpack(head)
        if version != 1:
            raise Unreadable(f"its .idx is of version {version}; version 1 is read")
        if code not in _CODES or np.dtype(_CODES[code]).kind == "f":
            kind = f"{np.dtype(_CODES[code])} ({code})" if code in _CODES else code
            raise Unreadable(f"its .idx says that the tokens are of type {kind}; integers are read (1 to 5 and 8)")
        index = cls(np.dtype(_CODES[code]), sequences, borders, source)
        size, wanted = source.seek(0, 2), _HEADER.size + 12 * sequences + 8 * borders
        if size == wanted + sequences and sequences:
            raise Unreadable("its .idx has modes of sequences: it is of texts with images, which are not read")
        if size != wanted:
            raise Unreadable(
                f"its .idx has {size:,} bytes, not {wanted:,} for {sequences:,} sequences: cut off or damaged"
            )
        return index

    def lengths(self, start: int, stop: int) -> np.ndarray:
        return self._numbers("<i4", _HEADER.size, start, stop)

    def places(self, start: int, stop: int) -> np.ndarray:
        return self._numbers("<i8", _HEADER.size + 4 * self.sequences, start, stop)

    def documents(self, start: int, stop: int) -> np.ndarray:
        return self._numbers("<i8", _HEADER.size + 12 * self.sequences, start, stop)

    def _numbers(self, kind: str, begin: int, start: int, stop: int) -> np.ndarray:
        self.source.seek(begin + start * np.dtype(kind).itemsize)
        return _ids(self.source, np.dtype(kind), stop - start)


def megatron_cuts(source: Source, size: int) -> list[tuple[int, int, int]]:
    """Return the pieces of a Megatron data set: documents from and to, and about their bytes.

    Args:
        source: the index.
        size: of the `.bin`, in bytes.

    Raises:
        Unreadable: the index is damaged, or is not that of these tokens.
    """
    index = _Index.read(source)
    last = index.sequences - 1
    end = (
        int(index.places(last, last + 1)[0]) + int(index.lengths(last, last + 1)[0]) * index.kind.itemsize
        if last >= 0
        else 0
    )
    if end != size:
        raise Unreadable(
            f"its .idx ends at byte {end:,}, but it has {size:,}; they are not of one data set, or one is cut off"
        )
    borders = [int(index.documents(at, at + 1)[0]) for at in (0, index.borders - 1)] if index.borders else []
    if borders != [0, index.sequences]:
        raise Unreadable(
            f"its .idx is damaged: the documents' borders go from {borders}, not from 0 to {index.sequences}"
        )
    return even_cuts(index.borders - 1, size)


def _megatron(piece: Piece, vocab_size: int, tell: Callable[[object], None]) -> Iterator[tuple[np.ndarray, int]]:
    with source_of(piece, ".idx") as beside, source_of(piece) as source:
        index = _Index.read(beside)
        stop, size = index.borders - 1 if piece.stop < 0 else piece.stop, source.seek(0, 2)
        for first in range(piece.start, stop, DOCUMENTS):
            borders = index.documents(first, min(first + DOCUMENTS, stop) + 1).tolist()
            if borders != sorted(borders) or borders[0] < 0 or borders[-1] > index.sequences:
                raise Unreadable(f"its .idx is damaged: the borders of the documents from {first + 1} on do not rise")
            lengths = index.lengths(borders[0], borders[-1]).tolist()
            places = index.places(borders[0], borders[-1]).tolist()
            for number, (a, b) in enumerate(itertools.pairwise(borders), first + 1):
                own = slice(a - borders[0], b - borders[0])
                try:
                    ids = _document(source, index.kind, places[own], lengths[own], size)
                    if why := _outside(ids, vocab_size, 0):
                        raise Unreadable(why)
                except Unreadable as error:
                    tell(f"document {number}: {error}")
                    continue
                if len(ids):
                    yield ids, number - piece.start


def _document(source: Source, kind: np.dtype, places: list[int], lengths: list[int], size: int) -> np.ndarray:
    parts = [np.empty(0, kind)]
    for place, length in zip(places, lengths, strict=True):
        if place < 0 or length < 0 or place + length * kind.itemsize > size:
            raise Unreadable(f"its .idx is damaged: {length:,} tokens at byte {place:,} of {size:,}")
        if source.tell() != place:
            source.seek(place)
        parts.append(_ids(source, kind, length))
    return parts[1] if len(parts) == 2 else np.concatenate(parts)


def _ids(source: Source, kind: np.dtype, count: int) -> np.ndarray:
    data = source.read(count * kind.itemsize) if count else b""
    if len(data) < count * kind.itemsize:
        raise Unreadable(f"it ends {count * kind.itemsize - len(data):,} bytes too early: damaged or cut off")
    return np.frombuffer(data, kind)


def _outside(ids: np.ndarray, vocab_size: int, first: int) -> str:
    """Return which id is outside of the vocabulary; nothing where none is."""
    if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
        return ""
    at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
    return f"token {first + at} has the id {ids[at]}, but the vocabulary has the ids 0 to {vocab_size - 1}"
