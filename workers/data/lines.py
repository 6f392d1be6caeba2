"""Text and JSONL, plain or compressed, as streams: what is held is one block and one line, whatever the file's size.

A line belongs to the piece in which its first byte lies, so that pieces of any size have each line once.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import zstandard

from workers.common.text import kind_of, visible
from workers.data.chat import ChatError, written
from workers.data.formats import MAX_WINDOW, why_no_text
from workers.data.pieces import Piece, Source, source_of

BLOCK = 2**20
"""Bytes that are read at a time."""
PACKED_BLOCK = 2**14
"""The same of a compressed file: a block that unpacks to the most that zlib or zstd can make of it still fits."""
LINE_BYTES = 2**28
"""The longest line."""
TEXT_BYTES = 2**31
"""The largest text file."""
BOM = b"\xef\xbb\xbf"
_SHOWN = 60
_DECODERS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj(),
}


class Unreadable(Exception):
    """Why a document cannot be read."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document."""

    text: bytes
    """In UTF-8."""
    row: int
    """Of its line or row in the piece, from 1: `rows_before` says what to add for its number in the file; 0 where the
    document is the whole file."""


def text_of(piece: Piece) -> bytes:
    """Return the bytes of a text file.

    Raises:
        Unreadable: it is damaged, no text or too large.
    """
    parts, held = [], 0
    with source_of(piece) as source:
        for block in _blocks(source, piece.compression):
            parts.append(block)
            held += len(block)
            if held > TEXT_BYTES:
                raise Unreadable(f"longer than {TEXT_BYTES >> 20:,} MiB, too much for one document; use JSONL")
    text = b"".join(parts)
    if text.strip() and (why := why_no_text(text)):
        raise Unreadable(why)
    return text


def json_documents(piece: Piece, field: str, bad: Callable[[int, str], None], chat: bool = False) -> Iterator[Document]:
    """Yield the documents of a piece of JSONL.

    Args:
        piece: the piece.
        field: of each row that holds the text, or the messages.
        chat: whether it is conversations.
        bad: is told the number of a line in the piece that cannot be read, and why.
    """
    row = 0
    with source_of(piece) as source:
        if piece.start:  # The newline before may be the end of a line that is another piece's.
            source.seek(piece.start - 1)
        blocks = _blocks(source, piece.compression)
        try:
            found = _lines(blocks, max(0, piece.start - 1), piece.stop)
            for row, line in enumerate(islice(found, 1 if piece.start else 0, None), 1):
                try:
                    found_row = _row_in(line, first=row == 1 and not piece.start)
                    if found_row is not None and (text := _document(found_row, field, chat)).strip():
                        yield Document(text, row)
                except Unreadable as error:
                    bad(row, str(error))
        except Unreadable as error:  # The archive: there is no more of it.
            bad(row + 1, f"{error}; this line and all after it are lost, and those before it may be damaged")


def lines_before(piece: Piece) -> int:
    """Return the lines of the file that begin before a piece of it."""
    if not piece.start:
        return 0
    lines, left = 1, piece.start - 1
    with source_of(piece) as source:
        while left and (block := source.read(min(BLOCK, left))):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines


def _blocks(source: Source, compression: str) -> Iterator[bytes]:
    """Yield the content of a file; gzip may have several members, and zstd several frames.

    Raises:
        Unreadable: it is cut off or damaged.
    """
    if not compression:
        yield from iter(lambda: source.read(BLOCK), b"")
        return
    decoder, packed = _DECODERS[compression](), b""
    while packed := packed or source.read(PACKED_BLOCK):
        if decoder.eof:
            if compression == "gzip" and not (packed := packed.lstrip(b"\0")):
                continue  # Tapes and some tools fill up with zeros.
            decoder = _DECODERS[compression]()
        try:
            block = decoder.decompress(packed)
        except (zlib.error, zstandard.ZstdError) as error:
            raise Unreadable(f"the {compression} data is damaged ({error})") from error
        packed = decoder.unused_data if decoder.eof else b""
        if block:
            yield block
    if not decoder.eof:
        raise Unreadable(f"the {compression} data is cut off")


def _lines(blocks: Iterable[bytes], offset: int, stop: int) -> Iterator[bytes | None]:
    """Yield the lines that begin before byte `stop`, without their ends; None for one that is too long.

    Args:
        blocks: bytes from byte `offset` of the file on.
        offset: where they begin.
        stop: a byte of the file, or below 0 for its end.
    """
    parts, held = [], 0  # Of the line that begins at `offset`.
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        held += len(first)
        if held > LINE_BYTES:
            parts.clear()
        if not others:
            if not parts and 0 <= stop <= offset + held:
                break  # Its rest is nobody's.
            continue
        for line in (b"".join(parts) if parts else None, *others[:-1]):
            if 0 <= stop <= offset:
                return
            yield line if line is None or len(line) <= LINE_BYTES else None
            offset += (held if line is None else len(line)) + 1
        parts, held = [others[-1]], len(others[-1])
    if held and not 0 <= stop <= offset:
        yield b"".join(parts) if held <= LINE_BYTES else None


def _row_in(line: bytes | None, first: bool) -> dict[str, Any] | None:
    """Return the object in a line; None where it is blank."""
    if line is None:
        raise Unreadable(f"longer than {LINE_BYTES >> 20:,} MiB; is it JSONL, one object in a line?")
    if first:
        line = line.removeprefix(BOM)
    if not line.strip():
        return None
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise Unreadable(why_no_text(line)) from None
    except RecursionError:
        raise Unreadable("no JSON that is read: too many brackets within each other") from None
    except ValueError as error:
        if b"\0" in line:
            raise Unreadable(why_no_text(line)) from None
        more = "; JSONL has a whole object in each line" if line.strip() in (b"{", b"[") else ""
        raise Unreadable(f"no JSON ({error}): {_shown(line.decode().strip())}{more}") from None
    if not isinstance(row, dict):
        more = "; JSONL has one object in each line, no list around them" if isinstance(row, list) else ""
        raise Unreadable(f"{kind_of(row)}, not an object: {_shown(line.decode().strip())}{more}")
    return row


def _document(row: dict[str, Any], field: str, chat: bool) -> bytes:
    value = _member(row, field)
    if not chat:
        return _encoded(value, field)
    try:
        return written(value)
    except ChatError as error:
        raise Unreadable(f"field {field!r}: {error}") from None


def _member(row: dict[str, Any], field: str) -> Any:
    """Return the member of an object; `a.b` is one called so, else that of an object `a`."""
    if field in row:
        return row[field]
    value: Any = row
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            names = _shown(", ".join(row)) or "none"
            raise Unreadable(f"no field {field!r}; its fields are {names}")
        value = value[name]
    return value


def _encoded(value: Any, field: str) -> bytes:
    if not isinstance(value, str):
        raise Unreadable(f"field {field!r} is {kind_of(value)}, not a text")
    try:
        text = value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise Unreadable(f"field {field!r} has half a character ({half}) at character {error.start}") from None
    if b"\0" in text:
        raise Unreadable(f"field {field!r} has a zero byte ({why_no_text(text)})")
    return text


def _shown(text: str) -> str:
    return visible(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
