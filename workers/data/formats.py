"""What a file is, by its first bytes and then by its name: nothing compressed or binary passes for text.

The first bytes decide, for names lie; a name counts where bytes say nothing, and where it promises a format whose first
bytes are not there, the file is damaged.
"""

import codecs
import re
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

import zstandard

HEAD = 8192
"""Bytes of a file that are looked at."""
MAX_WINDOW = 2**31
"""Of zstd: what `zstd --long=31` asks for, with which many large collections of text are packed."""
COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
LINES = {".jsonl", ".ndjson", ".jsonlines", ".json"}
TEXTS = ("text", "jsonl")

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd"),
    (b"PAR1", "parquet", "Parquet"),
    (b"ARROW1\0\0", "arrow", "an Arrow file"),
    (b"\xff\xff\xff\xff", "arrow", "an Arrow stream"),
    (b"\x93NUMPY", "npy", "a numpy array"),
    (b"MMIDIDX\0\0", "megatron", "the index of a Megatron data set"),
    (b"PARE", "", "encrypted Parquet"),
    (b"FEA1", "", "Feather of version 1"),
    (b"PK\x03\x04", "", "a ZIP archive"),
    (b"PK\x05\x06", "", "an empty ZIP archive"),
    (b"BZh", "", "bzip2"),
    (b"\xfd7zXZ\0", "", "xz"),
    (b"\x5d\0\0", "", "LZMA"),
    (b"7z\xbc\xaf\x27\x1c", "", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "", "a RAR archive"),
    (b"\x04\x22\x4d\x18", "", "LZ4"),
    (b"\xff\x06\0\0sNaPpY", "", "Snappy"),
    (b"\x1f\x9d", "", "a file of Unix' compress"),
    (b"%PDF-", "", "a PDF"),
    (b"\x89PNG\r\n\x1a\n", "", "a PNG image"),
    (b"\xff\xd8\xff", "", "a JPEG image"),
    (b"GIF87a", "", "a GIF image"),
    (b"GIF89a", "", "a GIF image"),
    (b"RIFF", "", "a RIFF file (WebP, WAV, AVI)"),
    (b"SQLite format 3\0", "", "an SQLite database"),
    (b"\x89HDF\r\n\x1a\n", "", "HDF5"),
    (b"Obj\x01", "", "Avro"),
    (b"ORC", "", "ORC"),
    (b"GGUF", "", "a GGUF model"),
    (b"\x7fELF", "", "a program"),
    (b"\xff\xfe\0\0", "", "text in UTF-32"),
    (b"\0\0\xfe\xff", "", "text in UTF-32"),
    (b"\xff\xfe", "", "text in UTF-16"),
    (b"\xfe\xff", "", "text in UTF-16"),
)
"""First bytes, the format or compression that they stand for where we read it, and what it is in words."""
_PATTERNS = (
    (re.compile(rb"[\x50-\x5f]\x2a\x4d\x18"), "zstd", "zstd"),  # A skippable frame, as pzstd begins with.
    (re.compile(rb"\x80[\x02-\x05][\x00-\xff]"), "", "a pickle"),
    (re.compile(rb".{5}\0\0\0\{", re.DOTALL), "", "safetensors"),
    (re.compile(rb".{257}ustar", re.DOTALL), "", "a tar archive"),
)
_PROMISES = {
    **dict(COMPRESSIONS.items()),
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
    ".npy": "a numpy array",
    ".npz": "a ZIP archive",
    ".zip": "a ZIP archive",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".7z": "a 7-Zip archive",
    ".pdf": "a PDF",
    ".png": "a PNG image",
    ".jpg": "a JPEG image",
    ".jpeg": "a JPEG image",
    ".safetensors": "safetensors",
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_PACKED = {"bzip2", "xz", "LZMA", "LZ4", "Snappy", "a file of Unix' compress"}


@dataclass(frozen=True, slots=True)
class Found:
    """What a file is."""

    format: str = ""
    """Empty where it is nothing that is read."""
    compression: str = ""
    what: str = "text"
    """In words."""
    certain: bool = False
    """Its first bytes say so; otherwise its name does."""
    wrong: str = ""
    """Why it is not read."""


def recognize(head: bytes, path: str) -> Found:
    """Tell what a file is by its first HEAD bytes and its path."""
    name = PurePosixPath(path)
    form, what = _signature(head)
    if form not in ("gzip", "zstd"):
        return _uncompressed(head, name, form, what)
    if name.suffix.lower() in COMPRESSIONS:
        name = name.with_suffix("")
    inner = _uncompressed(first := first_bytes(head, form), name, *_signature(first))
    whole = f"{inner.what} within {form}"
    if inner.wrong:
        return Found("", form, whole, inner.certain, f"within {form}, it {inner.wrong}")
    if inner.format not in TEXTS:
        return Found("", form, whole, True, f"is {whole}, which is not read so; decompress it first")
    return Found(inner.format, form, form if not inner.certain else whole)


def _uncompressed(head: bytes, name: PurePosixPath, form: str, what: str) -> Found:
    if form in ("gzip", "zstd"):  # Once more, within another one.
        return Found("", "", what, True, f"is {what}; decompress it first")
    if form:
        return Found(form, "", what, True)
    if what:
        return Found("", "", what, True, _refusal(what))
    ending = name.suffix.lower()
    if promised := _PROMISES.get(ending):
        state = "does not begin so: it is damaged or has the wrong name" if head else "is empty"
        return Found(
            "",
            "",
            "text or something unknown" if head else "empty",
            False,
            f"is named {ending} ({promised}), but {state}",
        )
    return Found("jsonl" if ending in LINES else "text", what="text" if head else "empty")


def _refusal(what: str) -> str:
    if what in _PACKED:
        return f"is compressed with {what}; text may be plain, gzip or zstd"
    if what.startswith("text in "):
        return f"is {what}; convert it, as with `iconv -f {what.split()[-1]} -t UTF-8`"
    if what == "a ZIP archive":
        return "is a ZIP archive; unpack it, or name what is in it: zip://*::URL"
    return f"is {what}, not text"


def _signature(head: bytes) -> tuple[str, str]:
    """Return the format and the words for what begins so; empty for what may be text."""
    for first, form, what in _SIGNATURES:
        if head.startswith(first):
            if first.isascii() and first.decode().isprintable() and first != b"%PDF-" and _is_plain(head):
                break  # Prose may begin with `ORC` or `RIFF`.
            return form, what
    for pattern, form, what in _PATTERNS:
        if pattern.match(head) and not _is_plain(head):
            return form, what
    return "", ""


def _is_plain(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return not _CONTROL.search(head)


def first_bytes(head: bytes, compression: str) -> bytes:
    """Return the first bytes within a compressed file, of its own first bytes; none where they are damaged."""
    try:
        if compression == "gzip":
            return zlib.decompressobj(31).decompress(head, HEAD)
        return (
            zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
            .stream_reader(head, read_across_frames=True)
            .read(HEAD)
        )
    except (zlib.error, zstandard.ZstdError):
        return b""


def why_no_text(data: bytes) -> str:
    """Return why bytes are no text in UTF-8, and how that is mended; nothing where they are."""
    if (zero := data.find(0)) >= 0:
        return f"a zero byte at byte {zero}: {_guess(data, zero)}"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return f"no UTF-8: it ends within a character (byte {error.start}); it may be cut off"
        return f"no UTF-8: byte {data[error.start]:#04x} at byte {error.start}: {_guess(data, error.start)}"
    return ""


def _guess(data: bytes, at: int) -> str:
    near = data[max(0, at - 64) : at + 64]
    halves = [near[::2].count(0), near[1::2].count(0)]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (max(halves) > len(near) / 4 and min(halves) == 0):
        return "it looks like UTF-16; convert it, as with `iconv -f UTF-16 -t UTF-8`"
    if _CONTROL.search(near):
        return "it looks like binary data" if data[at] else "it looks like binary data, or its writer was cut off there"
    return "it looks like Latin-1 or Windows-1252; convert it, as with `iconv -f WINDOWS-1252 -t UTF-8`"
