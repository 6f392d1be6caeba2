"""Files become pieces, and pieces documents: as streams, with every document that cannot be read told by its place.

Nothing that is compressed or binary is read as text: what a file is comes from its bytes (`formats.py`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from fsspec import AbstractFileSystem

from workers.common.errors import ConfigError
from workers.common.storage import storage_errors
from workers.common.text import visible
from workers.data.chat import ChatError, written
from workers.data.docstrings import conversations
from workers.data.formats import HEAD, TEXTS, Found, recognize
from workers.data.lines import Document, Unreadable, json_documents, lines_before, text_of
from workers.data.pieces import PIECE_BYTES, Piece, other_ending, source_of, url_of
from workers.data.token_files import megatron_cuts, npy_cuts

TABLES = ("parquet", "arrow")
TOKENS = ("npy", "megatron")
DOCSTRINGS = "docstrings"


def pieces_of(fs: AbstractFileSystem, path: str, format: str = "auto", s3_endpoint: str = "") -> list[Piece]:
    """Return the pieces of a file, in its order; they depend on the file alone. An empty file has none.

    Args:
        fs: the file system.
        path: the path in it.
        format: as SourceConfig has it.
        s3_endpoint: of an S3 store that is not AWS.

    Raises:
        ConfigError: a format was named, and the file is of another one; or no URL would find it again.
        StorageError: it is not there, or cannot be read.
    """
    url = url_of(fs, path, s3_endpoint)
    with storage_errors(url):
        size = fs.info(path).get("size")
        end = HEAD if size is None else min(HEAD, size)
        head = bytes(fs.cat_file(path, start=0, end=end))[:HEAD] if end else b""  # type: ignore[arg-type]
        beside = format in ("auto", "megatron") and _other_half(fs, path)
    if beside and path.endswith(".idx"):
        return []  # It is read with its tokens.
    found = Found("megatron", certain=True) if beside else recognize(head, path)
    if found.format == "megatron" and not beside:
        found = replace(
            found, format="", wrong="is the index of a Megatron data set; its tokens, a .bin beside it, are not there"
        )
    if format != "auto":
        found = _named(found, format, url)
    whole = Piece(url, found.format, size=size or 0, compression=found.compression, s3_endpoint=s3_endpoint)
    if found.wrong:
        return [replace(whole, format="", wrong=found.wrong)]
    if not head and not beside:
        return []
    try:
        cuts = _cuts(whole)
    except Unreadable as error:
        return [replace(whole, format="", wrong=str(error))]
    return [replace(whole, start=start, stop=stop, size=size) for start, stop, size in cuts] or [whole]


def documents(piece: Piece, field: str, bad: Callable[[str], None], chat: bool = False) -> Iterator[Document]:
    """Yield the documents of a piece; blank ones are left out.

    Args:
        piece: of text.
        field: that holds the text or the messages, in a row; `a.b` for one within another.
        chat: whether it is conversations, each as `chat.written` has it.
        bad: is told of each document that cannot be read: its file, its line or row, and why; then it goes on.

    Raises:
        ConfigError: there are no texts in it but tokens.
        StorageError: the file cannot be read.
    """

    def bad_row(row: int, why: str) -> None:
        bad(f"{place_in(piece, row)}: {why}")

    if piece.format in TOKENS:
        raise ConfigError(f"{piece.url}: it holds tokens, not text; put it into a source of its own")
    if piece.wrong:
        bad_row(0, piece.wrong)
    elif piece.format == "jsonl":
        yield from json_documents(piece, field, bad_row, chat)
    elif piece.format in TABLES:
        from workers.data.tables import table_documents  # pyarrow takes its time to import.

        yield from table_documents(piece, field, bad_row, chat)
    else:
        try:
            text = text_of(piece)
            if piece.format == DOCSTRINGS:
                yield from _docstrings(text, bad_row)
            elif text.strip():
                yield Document(text, 0)
        except Unreadable as error:
            bad_row(0, str(error))


def _docstrings(text: bytes, bad: Callable[[int, str], None]) -> Iterator[Document]:
    """Yield the conversations about the functions of Python source."""
    for row, value in enumerate(conversations(text), 1):
        try:
            yield Document(written(value), row)
        except ChatError as error:
            bad(row, str(error))


def place_in(piece: Piece, row: int) -> str:
    """Return what a person knows a document of a piece by: its file, and its line or row there; 0: the whole file."""
    return f"{visible(piece.url)}:{rows_before(piece) + row}" if row else visible(piece.url)


def rows_before(piece: Piece) -> int:
    """Return what is to be added to the rows of a piece's documents for their numbers in the file.

    For a part of a JSONL file, all that lies before it is read: ask for what is shown to a person.
    """
    if piece.format == "jsonl":
        return lines_before(piece)
    if piece.format in TABLES:
        from workers.data.tables import table_rows_before

        return table_rows_before(piece)
    return piece.start if piece.format == "megatron" else 0


def _cuts(piece: Piece) -> list[tuple[int, int, int]]:
    """Return the parts of a file: (start, stop, bytes) of each; none where it stays whole."""
    if piece.format == "jsonl" and not piece.compression:
        stops = [(number + 1) * PIECE_BYTES for number in range(math.ceil(piece.size / PIECE_BYTES))]
        return [
            (stop - PIECE_BYTES, min(stop, piece.size), min(stop, piece.size) - stop + PIECE_BYTES) for stop in stops
        ]
    if piece.format == "megatron":
        with source_of(piece, ".idx") as index:
            return megatron_cuts(index, piece.size)
    if piece.format in (*TABLES, "npy"):
        with source_of(piece) as source:
            if piece.format == "npy":
                return npy_cuts(source, piece.size)
            from workers.data.tables import arrow_cuts, parquet_cuts

            return parquet_cuts(source) if piece.format == "parquet" else arrow_cuts(source, piece.size)
    return []


def _other_half(fs: AbstractFileSystem, path: str) -> bool:
    """Tell whether a Megatron data set's other file lies beside this one."""
    other = {".bin": ".idx", ".idx": ".bin"}.get(path[-4:])
    return other is not None and fs.exists(other_ending(path, other))


def _named(found: Found, format: str, url: str) -> Found:
    """Return what a file is where its format was named.

    Raises:
        ConfigError: it is something else.
    """
    if found.format == format and not found.wrong:
        return found
    if format == "chat":
        if url.endswith(".py") and found.format == "text":
            return replace(found, format=DOCSTRINGS)
        return found if found.format in TABLES else _named(found, "jsonl", url)
    if format in TEXTS and not found.certain:
        if found.wrong and found.compression:
            found = replace(found, wrong="")
        return replace(found, format=format, wrong="")
    what = found.wrong or f"is {found.what}"
    if format == "megatron":
        what = f"{what}, not one of the two files (.bin, .idx) of a Megatron data set, or the other is not there"
    raise ConfigError(f"{url}: its format should be {format!r}, but it {what}. Mend the source's format, or its urls")
