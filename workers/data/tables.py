"""Parquet and Arrow: the text's column alone, a few rows at a time, whatever type the text has there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import ipc

from workers.data.chat import ChatError, written
from workers.data.formats import why_no_text
from workers.data.lines import Document, Unreadable
from workers.data.pieces import Piece, Source, cuts, even_cuts, source_of

BATCH_BYTES = 8 * 2**20
"""Of text that is taken out of a Parquet file at a time, more or less."""
BUFFER_BYTES = 2**20
MAX_ROWS = 8192
_FILE = b"ARROW1"
_OF_DAMAGE = (ValueError, KeyError, IndexError, OverflowError)
"""What pyarrow lets through of a file whose bytes were changed."""


class NoColumn(Unreadable):
    """No row of the file has the text."""


def parquet_cuts(source: Source) -> list[tuple[int, int, int]]:
    """Return the pieces of a Parquet file: row groups from and to, and their bytes.

    Raises:
        Unreadable: it is damaged.
    """
    with _damage(source):
        about = _opened(source).metadata
        return cuts([about.row_group(number).total_byte_size for number in range(about.num_row_groups)])


def arrow_cuts(source: Source, size: int) -> list[tuple[int, int, int]]:
    """Return the pieces of an Arrow file: record batches from and to, and about their bytes; none for a stream.

    Raises:
        Unreadable: it is damaged.
    """
    if not _is_file(source):
        return []
    with _damage(source):
        return even_cuts(ipc.open_file(source).num_record_batches, size)


def table_documents(
    piece: Piece, field: str, bad: Callable[[int, str], None], chat: bool = False
) -> Iterator[Document]:
    """Yield the documents of a piece of a Parquet or Arrow file.

    Args:
        piece: the piece.
        field: name of the column, or `a.b` for one within another one.
        chat: whether it is conversations, each a list of structs.
        bad: is told the number of a row in the piece that cannot be read, and why; 0 for the whole file.
    """
    row = 0
    with source_of(piece) as source:
        try:
            kind = _Kind(field, chat)
            for rows, column in (_parquet if piece.format == "parquet" else _arrow)(source, piece, kind):
                if isinstance(column, Unreadable):
                    bad(row + 1, f"{column}; {rows:,} rows are lost")
                    row += rows
                    continue
                for text in column:
                    row += 1
                    try:
                        if (whole := kind.document(text)).strip():
                            yield Document(whole, row)
                    except Unreadable as error:
                        bad(row, str(error))
        except NoColumn as error:
            if not piece.start:  # Once for the file.
                bad(0, str(error))
        except Unreadable as error:
            bad(row and row + 1, str(error))


def table_rows_before(piece: Piece) -> int:
    """Return the rows of the file that lie before a piece of it."""
    if not piece.start:
        return 0
    with source_of(piece) as source:
        if piece.format == "parquet":
            about = _opened(source).metadata
            return sum(about.row_group(number).num_rows for number in range(piece.start))
        reader = ipc.open_file(source)
        return sum(reader.get_batch(number).num_rows for number in range(piece.start))


@dataclass(frozen=True)
class _Kind:
    """What a column holds."""

    field: str
    """Its name, or the way to it."""
    chat: bool
    """Conversations; otherwise texts."""

    def path(self, schema: pa.Schema) -> list[str]:
        """Return the names that lead to the column.

        Raises:
            Unreadable: there is none of that kind.
        """
        path, kind = _found(schema, self.field)
        if not (_is_list(kind) if self.chat else _is_text(kind)):
            raise NoColumn(f"column {self.field!r} is of type {kind}, not of {'lists' if self.chat else 'text'}")
        return path

    def values(self, batch: pa.RecordBatch, path: list[str]) -> list[Any]:
        """Return what is in the column."""
        column = batch.column(path[0])
        if len(path) > 1:
            column = pc.struct_field(column, path[1:])  # type: ignore[attr-defined]
        if not self.chat:
            return _texts(column)
        column.validate(full=True)
        return column.to_pylist()

    def document(self, value: Any) -> bytes:
        """Return a document.

        Raises:
            Unreadable: it is none.
        """
        if not self.chat:
            return _checked(value, self.field)
        try:
            return written(value)
        except ChatError as error:
            raise Unreadable(f"column {self.field!r}: {error}") from None


Values = Iterator[tuple[int, "list[Any] | Unreadable"]]
"""Rows, and what they hold or why they are lost."""


def _parquet(source: Source, piece: Piece, kind: _Kind) -> Values:
    file = _opened(source)
    with _damage(source):
        path = kind.path(file.schema_arrow)
        stop = file.num_row_groups if piece.stop < 0 else piece.stop
        groups = [file.metadata.row_group(number) for number in range(piece.start, stop)]
        sizes = [_bytes_of(group, ".".join(path)) for group in groups]
    for number, group, size in zip(range(piece.start, stop), groups, sizes, strict=True):
        seen = 0
        rows = max(1, min(MAX_ROWS, BATCH_BYTES * group.num_rows // max(1, size)))
        columns = [".".join(path)]
        try:
            with _damage(source):
                for batch in file.iter_batches(rows, row_groups=[number], columns=columns, use_threads=False):
                    yield batch.num_rows, (found := kind.values(batch, path))
                    seen += len(found)
        except Unreadable as error:
            yield group.num_rows - seen, Unreadable(f"row group {number}: {error}")


def _bytes_of(group: pq.RowGroupMetaData, path: str) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(
        column.total_uncompressed_size for column in columns if f"{column.path_in_schema}.".startswith(f"{path}.")
    )


def _arrow(source: Source, piece: Piece, kind: _Kind) -> Values:
    whole = _is_file(source)
    with _damage(source):
        schema = (ipc.open_file if whole else ipc.open_stream)(source).schema
        path = kind.path(schema)
        wanted = ipc.IpcReadOptions(included_fields=[schema.get_field_index(path[0])], use_threads=False)
        source.seek(0)
        if whole:
            reader = ipc.open_file(source, options=wanted)
            stop = reader.num_record_batches if piece.stop < 0 else piece.stop
            batches = (reader.get_batch(number) for number in range(piece.start, stop))
        else:
            batches = ipc.open_stream(source, options=wanted)
        for batch in batches:
            yield batch.num_rows, kind.values(batch, path)


@contextmanager
def _damage(source: Source) -> Iterator[None]:
    """Tell a file that is damaged from storage that fails."""
    try:
        yield
    except (pa.ArrowException, OSError, *_OF_DAMAGE) as error:
        if source.failed:
            raise source.failed from error
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise Unreadable(f"damaged or cut off ({said[0]})") from error


def _is_file(source: Source) -> bool:
    source.seek(0)
    first = source.read(len(_FILE))
    source.seek(0)
    return first == _FILE


def _opened(source: Source) -> pq.ParquetFile:
    with _damage(source):
        return pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)


def _found(schema: pa.Schema, field: str) -> tuple[list[str], pa.DataType]:
    """Return the names that lead to a column, and its type.

    Raises:
        Unreadable: there is none.
    """
    path = [field] if field in schema.names else field.split(".")
    kind: Any = pa.struct(list(schema))
    for name in path:
        place = kind.get_field_index(name) if pa.types.is_struct(kind) else -1
        if place < 0:
            twice = schema.names.count(name) > 1
            columns = ", ".join(schema.names) or "none"
            raise NoColumn(
                f"more than one column is called {name!r}"
                if twice
                else f"no column {field!r}; its columns are {columns}"
            )
        kind = kind.field(place).type
    return path, kind


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    known = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in known)


def _texts(column: pa.Array) -> list[bytes | None]:
    """Return the bytes in a column; the file may be damaged, so its offsets are checked before they are followed."""
    if isinstance(column, pa.DictionaryArray):
        column = pa.DictionaryArray.from_arrays(column.indices, _bytes(column.dictionary))
        column.validate(full=True)
        column = column.dictionary_decode()
    return _bytes(column).to_pylist()


def _bytes(column: pa.Array) -> pa.Array:
    kind = pa.binary_view() if "view" in str(column.type) else pa.large_binary()
    column.validate()
    column = column.cast(kind)
    column.validate(full=True)
    return column


def _checked(text: bytes | None, field: str) -> bytes:
    if text is None:
        raise Unreadable(f"column {field!r} is null")
    if why := why_no_text(text):
        raise Unreadable(f"column {field!r}: {why}")
    return text
