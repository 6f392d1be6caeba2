import bz2
import gzip
import io
import itertools
import json
import lzma
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc

from jobs.stack.seaweed import s3_environment, seaweedfs
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store, open_source
from workers.data import lines, pieces
from workers.data.documents import Piece, documents, pieces_of, rows_before
from workers.data.files import files_of_urls
from workers.data.lines import Document

ROWS = [{"text": f"row {i}: " + "äöü €𝄞"[i % 7 :] * (i % 5), "id": i} for i in range(60)]
TEXTS = [row["text"].encode() for row in ROWS]
JSONL = "".join(json.dumps(row, ensure_ascii=row["id"] % 2 == 0) + "\n" for row in ROWS).encode()
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(place, field="text", format="auto", endpoint="") -> tuple[list[Document], list[str]]:
    """Return the documents of a file, with their rows in the file, and what was told of the bad ones."""
    fs, path = open_source(str(place), endpoint)
    found, bad = [], []
    for piece in pieces_of(fs, path, format, endpoint):
        piece = pickle.loads(pickle.dumps(piece))
        own = list(documents(piece, field, bad.append))
        found += [Document(doc.text, doc.row and doc.row + rows_before(piece)) for doc in own]
    return found, bad


def written(folder: Path, name: str, data: bytes) -> Path:
    file = folder / name
    file.write_bytes(data)
    return file


def told(place, **how) -> str:
    """Return the one message about a file without any documents."""
    found, bad = read(place, **how)
    assert not found and len(bad) == 1, (found, bad)
    return bad[0]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "no-ending", "A.TXT"])
@pytest.mark.parametrize(
    "text", ["plain", "\ufeffmarked\r\n", " äöü \n\n", "{}", "ORC", "BZh", "RIFF and PAR1", "PK\x03"]
)
def test_a_text_file_is_one_document_of_exactly_its_bytes(tmp_path, name, ending, text):
    file = written(tmp_path, name + ending, PACK[ending](text.encode()))
    assert read(file) == ([Document(text.encode(), 0)], [])


@pytest.mark.parametrize("ending", PACK)
def test_blank_files_and_rows_are_left_out(tmp_path, ending):
    for name in ("a.txt", "a.jsonl"):
        assert read(written(tmp_path, name + ending, PACK[ending](b" \n\r\n\t"))) == ([], [])
        if not ending:
            assert read(written(tmp_path, name, b"")) == ([], [])
    rows = b'\n{"text": " \\n"}\n\n{"text": ""}\n{"text": "b"}\n'
    assert read(written(tmp_path, "b.jsonl" + ending, PACK[ending](rows))) == ([Document(b"b", 5)], [])


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_rows_of_jsonl(tmp_path, name, ending):
    for data in (JSONL, JSONL[:-1], JSONL.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + JSONL):
        found, bad = read(written(tmp_path, name + ending, PACK[ending](data)))
        assert not bad and found == [Document(text, i) for i, text in enumerate(TEXTS, 1)]


def test_a_packed_file_is_known_by_its_bytes_and_read_through_members_frames_and_padding(tmp_path):
    half = len(JSONL) // 2
    two = [JSONL[:half], JSONL[half:]]
    frames = b"".join(zstandard.compress(part) for part in two)
    long = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=30)).compress(
        JSONL
    )
    for number, data in enumerate(
        [
            b"".join(gzip.compress(part) for part in two),
            b"".join(gzip.compress(part) for part in (b"", *two, b"")),
            gzip.compress(JSONL) + bytes(1000),
            frames,
            b"\x50\x2a\x4d\x18\x04\0\0\0skip" + frames + b"\x51\x2a\x4d\x18\x04\0\0\0skip",
            zstandard.compress(b"") + frames,
            long,
        ]
    ):
        file = written(tmp_path, f"{number}.jsonl", data)  # No ending says that it is packed.
        assert read(file) == ([Document(text, i) for i, text in enumerate(TEXTS, 1)], []), number


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_file_that_is_cut_anywhere_is_one_bad_document_after_its_whole_rows(tmp_path, ending):
    data = PACK[ending](JSONL) if ending == ".gz" else b"".join(map(zstandard.compress, JSONL.splitlines(True)))
    for cut in (*range(2 if ending == ".gz" else 4, 40), *range(40, len(data), 37), len(data) - 1):
        found, bad = read(written(tmp_path, f"a.jsonl{ending}", data[:cut]))
        assert [doc.text for doc in found] == TEXTS[: len(found)]
        if ending == ".gz" or bad:  # A cut between two frames cannot be seen.
            (message,) = bad
            assert f"a.jsonl{ending}:{len(found) + 1}: the " in message and "data is cut off" in message
            assert "cut off" in told(written(tmp_path, f"a.txt{ending}", data[:cut]))
    assert len(found) >= len(TEXTS) - 1


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_damaged_byte_of_a_packed_file_is_told(tmp_path, ending):
    params = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    data = bytearray(params[ending](JSONL))
    data[len(data) // 2] ^= 0xFF
    _, bad = read(written(tmp_path, f"a.jsonl{ending}", bytes(data)))
    assert any("data is damaged" in message and "those before it may be" in message for message in bad)
    assert "data is damaged" in told(written(tmp_path, f"a.txt{ending}", bytes(data)))


def binaries() -> dict[str, tuple[bytes, str]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "text")
    return {
        "a.zip": (archive.getvalue(), "is a ZIP archive; unpack it, or name what is in it: zip://"),
        "a.npz": (archive.getvalue(), "is a ZIP archive"),
        "a.bz2": (bz2.compress(JSONL), "is compressed with bzip2; text may be plain, gzip or zstd"),
        "a.xz": (lzma.compress(JSONL), "is compressed with xz"),
        "a.lzma": (lzma.compress(JSONL, lzma.FORMAT_ALONE), "is compressed with LZMA"),
        "a.7z": (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(30), "is a 7-Zip archive"),
        "a.pdf": (b"%PDF-1.4\n1 0 obj\n", "is a PDF, not text"),
        "a.png": (b"\x89PNG\r\n\x1a\n" + bytes(30), "is a PNG image, not text"),
        "a.jpg": (b"\xff\xd8\xff\xe0" + bytes(30), "is a JPEG image, not text"),
        "a.pickle": (pickle.dumps(ROWS), "is a pickle, not text"),
        "a.sqlite": (b"SQLite format 3\0" + bytes(30), "is an SQLite database"),
        "a.safetensors": (b"\x40\0\0\0\0\0\0\0{" + b'"a":{}}', "is safetensors"),
        "a.tar": (b"a.txt" + bytes(252) + b"ustar" + bytes(200), "is a tar archive"),
        "a.wav": (b"RIFF\x10\0\0\0WAVE", "is a RIFF file"),
        "utf16": ("täxt".encode("utf-16"), "is text in UTF-16; convert it, as with `iconv -f UTF-16"),
        "utf32": ("täxt".encode("utf-32"), "is text in UTF-32"),
    }


@pytest.mark.parametrize("case", binaries())
@pytest.mark.parametrize("ending", ["", ".txt", ".jsonl", ".txt.gz", ".jsonl.zst"])
def test_what_is_packed_in_another_way_or_binary_is_bad_whatever_its_name(tmp_path, case, ending):
    data, why = binaries()[case]
    pack = PACK[ending[ending.rfind(".") :] if ending.endswith(("z", "t")) and ending != ".txt" else ""]
    file = written(tmp_path, case + ending, pack(data))
    assert f"{file}: " in (message := told(file)) and why in message
    assert ("within" in message) == (pack is not bytes)
    for format in ("text", "jsonl", "parquet", "arrow", "npy", "megatron"):
        with pytest.raises(ConfigError, match=f"{case}.*its format should be '{format}', but it .*Mend the source's"):
            read(file, format=format)


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        (
            "a.txt",
            "Straße".encode("latin-1"),
            "no UTF-8: byte 0xdf at byte 4: it looks like Latin-1 .*iconv -f WINDOWS",
        ),
        ("a.txt", b"\xef\xbb\xbfab\xff", "byte 0xff at byte 5"),
        ("a.txt", "text €".encode()[:-1], "ends within a character .byte 5.; it may be cut off"),
        ("a.txt", "no mark".encode("utf-16-le"), "a zero byte at byte 1: it looks like UTF-16"),
        ("a.txt", "no mark".encode("utf-16-be"), "a zero byte at byte 0: it looks like UTF-16"),
        ("a.txt", b"text\0", "a zero byte at byte 4: it looks like binary"),
        ("a.txt", b"t" * 10**6 + b"\0", "a zero byte at byte 1000000"),
        ("a.bin", np.random.default_rng(1).bytes(5000), "it looks like binary data"),
        ("a.txt", b"\xed\xa0\x80", "no UTF-8: byte 0xed at byte 0"),
        ("a.txt", b"\xc0\xafabc", "no UTF-8: byte 0xc0"),
        ("a.gz", b"plain", r"is named .gz \(gzip\), but does not begin so: it is damaged or has the wrong name"),
        ("a.parquet", b"plain", "is named .parquet"),
        ("a.parquet", b"", r"is named .parquet \(Parquet\), but is empty"),
        ("a.txt.zst", b"", "is named .zst"),
        ("a.xz", b"plain", "is named .xz"),
        ("a.gz.gz", gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), "gzip, it is gzip; decompress it first"),
    ],
)
def test_a_file_that_is_no_text_is_one_bad_document_that_says_how_to_mend_it(tmp_path, name, data, why):

    assert re.search(why, told(written(tmp_path, name, data)))


BAD_ROWS = {
    "{": r"no JSON \(.*\): \{; JSONL has a whole object",
    '{"text": "a"': "no JSON",
    "plain text": "no JSON .*: plain text$",
    '{"text": "a"} {"text": "b"}': "no JSON .*Extra data",
    "[1]": "a list, not an object: .*JSONL has one object in each line",
    '"text"': "a text, not an object",
    "3": "a number, not an object",
    "null": "null, not an object",
    '{"txt": "a", "id": 3}': "no field 'text'; its fields are txt, id",
    "{}": "no field 'text'; its fields are none",
    '{"text": null}': "field 'text' is null, not a text",
    '{"text": 3.5}': "field 'text' is a number",
    '{"text": ["a"]}': "field 'text' is a list",
    '{"text": {"text": "a"}}': "field 'text' is an object",
    '{"text": true}': "field 'text' is true or false",
    '{"text": "a\\ud800b"}': r"half a character \(\\ud800\) at character 1",
    '{"text": "a\\u0000b"}': "has a zero byte",
    "[" * 100_000: "too many brackets",
    '{"text": "a", "n": ' + "1" * 5000 + "}": "no JSON",
    "\x1b[2Jx" + "y" * 500: r"no JSON .*: \\x1b\[2Jxy+\.\.\.$",
}


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_told_by_its_line_and_the_others_are_read(tmp_path, row, ending):

    data = b'{"text": "a"}\n\n' + row.encode() + b'\r\n{"text": "b"}\n'
    found, bad = read(file := written(tmp_path, "a.jsonl" + ending, PACK[ending](data)))
    assert found == [Document(b"a", 1), Document(b"b", 4)] and len(bad) == 1
    assert bad[0].startswith(f"{file}:3: ") and re.search(BAD_ROWS[row], bad[0]), bad


def test_rows_that_are_no_text_in_utf8(tmp_path):
    rows = [
        b'{"text": "Stra\xdfe"}',
        b'{"text": "\0"}',
        b"\0" * 9,
        b"\xef\xbb\xbf{}",
        '{"text": "a"}'.encode("utf-16-le"),
    ]
    found, bad = read(written(tmp_path, "a.jsonl", b"\n".join([*rows, b'{"text": "b"}'])))
    assert found == [Document(b"b", 6)] and len(bad) == 5
    assert "jsonl:1: no UTF-8: byte 0xdf at byte 14: it looks like Latin-1" in bad[0]
    assert "jsonl:2: a zero byte at byte 10" in bad[1] and "jsonl:3: a zero byte at byte 0: it looks like" in bad[2]
    assert "jsonl:4: no JSON" in bad[3] and "jsonl:5: a zero byte at byte 1: it looks like UTF-16" in bad[4]


def test_a_field_within_another_one_and_one_with_a_dot_in_its_name(tmp_path):
    rows = [
        {"a": {"b": {"c": "deep"}}},
        {"a.b.c": "dots", "a": {"b": {"c": "deep"}}},
        {"a": "text"},
        {"a": {"b": None}},
    ]
    found, bad = read(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode()), "a.b.c")
    assert [doc.text for doc in found] == [b"deep", b"dots"]
    assert [":3: no field 'a.b.c'" in bad[0], ":4: no field 'a.b.c'" in bad[1]] == [True, True]


LINE = st.sampled_from(['{"text": "a"}', '{"text": "äöü"}', "", "\r", "no JSON", '{"text": "' + "long" * 9 + '"}'])


@given(st.lists(LINE, max_size=12), st.booleans(), st.data())
def test_each_line_is_in_exactly_one_piece_wherever_the_file_is_cut(found_lines, ended, data):
    content = "\n".join(found_lines).encode() + b"\n" * ended
    ends = sorted(data.draw(st.sets(st.integers(1, max(1, len(content) - 1)), max_size=8)))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/cut/a.jsonl", content)
    whole, told_of_whole = rows_of([Piece("memory:///cut/a.jsonl", "jsonl", 0, len(content))])
    for block in (1, 3, 2**20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lines, "BLOCK", block)
            cut = [0, *(end for end in ends if end < len(content)), len(content)]
            parts = [Piece("memory:///cut/a.jsonl", "jsonl", a, b) for a, b in itertools.pairwise(cut)]
            assert rows_of(parts) == (whole, told_of_whole)
    assert len(whole) == sum('"text"' in line for line in found_lines)


def rows_of(parts):
    found, bad = [], []
    for piece in parts:
        found += [(doc.text, doc.row + rows_before(piece)) for doc in documents(piece, "text", bad.append)]
    return found, bad


def test_large_files_are_cut_and_all_rows_keep_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.data.documents.PIECE_BYTES", 500)
    file = written(tmp_path, "a.jsonl", JSONL.replace(b'"id": 40', b'"id": 4x'))
    found = pieces_of(*open_source(str(file)))
    assert len(found) == -(-len(JSONL) // 500) > 5 and sum(piece.size for piece in found) == len(JSONL)
    rows, bad = read(file)
    assert rows == [Document(text, i) for i, text in enumerate(TEXTS, 1) if i != 41]
    assert len(bad) == 1 and f"{file}:41: no JSON" in bad[0]
    packed = written(tmp_path, "b.jsonl.gz", gzip.compress(JSONL * 9))
    assert len(pieces_of(*open_source(str(packed)))) == 1


@pytest.mark.parametrize("ending", PACK)
def test_a_line_that_is_too_long_is_bad_and_held_by_nobody(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(lines, "LINE_BYTES", 2000)
    monkeypatch.setattr(lines, "BLOCK", 100)
    monkeypatch.setattr("workers.data.documents.PIECE_BYTES", 300)
    long = json.dumps({"text": "x" * 5000}).encode()
    for rows, good in (([long, b'{"text": "b"}', long], [2]), ([b'{"text": "b"}', long], [1]), ([long], [])):
        found, bad = read(file := written(tmp_path, "a.jsonl" + ending, PACK[ending](b"\n".join(rows))))
        assert [doc.row for doc in found] == good
        wrong = [f"{file}:{row}: longer than 0 MiB; is it JSONL, one object in a line?" for row in (1, 2, 3)]
        assert bad == [message for row, message in enumerate(wrong[: len(rows)], 1) if row not in good]
    monkeypatch.setattr(lines, "TEXT_BYTES", 2000)
    assert "too much for one document" in told(written(tmp_path, "a.txt" + ending, PACK[ending](b"x" * 3000)))


KINDS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of bytes": pa.dictionary(pa.int8(), pa.large_binary()),
}


def column(texts, kind):
    return pa.array(texts, pa.string()).cast(kind) if "view" not in str(kind) else pa.array(texts, kind)


def table_file(folder: Path, form: str, table: pa.Table, rows=7, name="a") -> Path:
    if form == "parquet":
        pq.write_table(table, file := folder / f"{name}.parquet", row_group_size=rows)
        return file
    file = folder / f"{name}.{'arrows' if form == 'stream' else 'arrow'}"
    make = ipc.new_stream if form == "stream" else ipc.new_file
    with make(file, table.schema) as writer:
        for first in range(0, len(table), rows):
            writer.write_batch(table.slice(first, rows).combine_chunks().to_batches()[0])
    return file


FORMS = ("parquet", "file", "stream")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_columns_of_text_of_all_types(tmp_path, monkeypatch, form, kind):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    texts = ["a", "", None, "äöü", " \n", "a\0b", *(text.decode() for text in TEXTS)]
    try:
        table = pa.table({"id": list(range(len(texts))), "text": column(texts, KINDS[kind])})
        file = table_file(tmp_path, form, table)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        pytest.fail(f"the test cannot write it: {error}")
    found, bad = read(file)
    assert [(doc.row, doc.text) for doc in found] == [
        (row, text.encode()) for row, text in enumerate(texts, 1) if row not in (2, 3, 5, 6)
    ]
    assert len(bad) == 2 and f"{file}:3: column 'text' is null" in bad[0] and ":6: column 'text': a zero" in bad[1]
    cut = pieces_of(*open_source(str(file)))
    assert (len(cut) > 1) == (form != "stream"), cut


@pytest.mark.parametrize("form", FORMS)
def test_bytes_in_a_column_that_are_no_utf8_are_told_by_their_row(tmp_path, form):
    for kind in (pa.binary(), pa.string()):
        texts = pa.array([b"good", b"Stra\xdfe", b"fine"], pa.binary()).view(kind)
        found, bad = read(table_file(tmp_path, form, pa.table({"text": texts})))
        assert [doc.row for doc in found] == [1, 3]
        assert len(bad) == 1 and ":2: column 'text': no UTF-8: byte 0xdf at byte 4: it looks like Latin-1" in bad[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_column_that_is_missing_or_no_text_is_told_once_for_the_file(tmp_path, monkeypatch, form):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100)
    table = pa.table({"id": list(range(60)), "t": [row["text"] for row in ROWS]})
    file = table_file(tmp_path, form, table)
    assert told(file) == f"{file}: no column 'text'; its columns are id, t"
    assert told(file, field="id") == f"{file}: column 'id' is of type int64, not of text"
    assert "no column 't.x'" in told(file, field="t.x")
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    assert "more than one column is called 'text'" in told(table_file(tmp_path, form, twice))
    nothing = table_file(tmp_path, form, pa.table({"text": pa.array([], pa.string())}))
    assert read(nothing) == ([], [])


@pytest.mark.parametrize("form", FORMS)
def test_a_column_within_another_one(tmp_path, form):
    rows = [{"a": {"b": {"c": "deep", "d": 1}}}, {"a": {"b": None}}, {"a": None}, {"a": {"b": {"c": "more", "d": 2}}}]
    table = pa.Table.from_pylist(rows)
    found, bad = read(table_file(tmp_path, form, table), "a.b.c")
    assert found == [Document(b"deep", 1), Document(b"more", 4)] and len(bad) == 2
    table = table.append_column("a.b.c", pa.array(["dots"] * 4))
    found, bad = read(table_file(tmp_path, form, table), "a.b.c")
    assert [doc.text for doc in found] == [b"dots"] * 4 and not bad


@pytest.mark.parametrize("form", FORMS)
def test_a_table_that_is_cut_or_damaged_is_told_and_never_ends_the_process(tmp_path, form):
    whole = table_file(tmp_path, form, pa.table({"text": [row["text"] for row in ROWS]})).read_bytes()
    suffix = {"parquet": "parquet", "file": "arrow", "stream": "arrows"}[form]
    for cut in (7, 8, 12, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        found, bad = read(written(tmp_path, f"cut.{suffix}", whole[:cut]))
        assert [doc.text for doc in found] == TEXTS[: len(found)]
        assert bad or (form == "stream" and len(found) == len(TEXTS)), cut
        assert not bad or (len(bad) == 1 and re.search("damaged", bad[0])), bad
    rng, told_of = np.random.default_rng(0), 0
    for _ in range(150):
        harmed = bytearray(whole)
        for at in rng.integers(8, len(whole), 3):
            harmed[at] = rng.integers(256)
        _, bad = read(written(tmp_path, f"harmed.{suffix}", bytes(harmed)))
        told_of += bool(bad)
    assert told_of > 50


def test_one_damaged_row_group_leaves_the_others(tmp_path):
    table = pa.table({"text": [row["text"] for row in ROWS]})
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, file := tmp_path / "a.parquet", row_group_size=20, write_page_checksum=True, **plain)
    data = bytearray(file.read_bytes())
    data[data.index(b"row 25")] ^= 1
    found, bad = read(written(tmp_path, "b.parquet", bytes(data)))
    assert found == [Document(TEXTS[row - 1], row) for row in (*range(1, 21), *range(41, 61))]
    assert len(bad) == 1 and "b.parquet:21: row group 1: damaged" in bad[0] and "20 rows are lost" in bad[0]


def test_parquet_and_arrow_within_gzip_are_not_read_as_text(tmp_path):
    for form in FORMS:
        data = table_file(tmp_path, form, pa.table({"text": ["a"]})).read_bytes()
        message = told(written(tmp_path, f"{form}.txt.gz", gzip.compress(data)))
        assert "within gzip, which is not read so; decompress it first" in message


def test_formats_that_are_named(tmp_path):
    file = written(tmp_path, "rows.log", JSONL)
    assert len(read(file)[0]) == 1 and len(read(file, format="jsonl")[0]) == len(TEXTS)
    assert read(written(tmp_path, "a.jsonl", JSONL), format="text")[0] == [Document(JSONL, 0)]
    with pytest.raises(ConfigError, match=r"rows.log: its format should be 'parquet', but it is text"):
        read(file, format="parquet")
    table = table_file(tmp_path, "parquet", pa.table({"text": ["a"]}))
    assert read(table, format="parquet")[0] == [Document(b"a", 1)]
    with pytest.raises(ConfigError, match=r"a.parquet: its format should be 'jsonl', but it is Parquet. Mend"):
        read(table, format="jsonl")
    assert read(table.rename(tmp_path / "misnamed.txt"))[0] == [Document(b"a", 1)]


@pytest.mark.parametrize(
    "url", ["zip://*::{}/a.zip", "zip://*::memory://packed/a.zip", "zip://*::simplecache::memory://packed/a.zip"]
)
def test_what_is_in_archives_is_found_again_by_its_url(tmp_path, url):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.jsonl", "below/b c.jsonl"):
            archive.writestr(name, JSONL)
        archive.writestr("c.parquet", table_file(tmp_path, "parquet", pa.table({"text": ["a"]})).read_bytes())
    fsspec.filesystem("memory").pipe_file("/packed/a.zip", (tmp_path / "a.zip").read_bytes())
    fs, _ = open_source(url.format(tmp_path))
    for name, count in (("a.jsonl", len(TEXTS)), ("below/b c.jsonl", len(TEXTS)), ("c.parquet", 1)):
        (piece,) = pieces_of(fs, name)
        assert piece.url.startswith(f"zip://{name}::")
        assert len(list(documents(pickle.loads(pickle.dumps(piece)), "text", pytest.fail))) == count


@pytest.mark.parametrize("name", ["a::b.txt", "zip:", "a b*[1].txt", "~", "ä,ö.txt", "s3:", "a#b?c=d.txt", "link"])
def test_a_local_name_stands_for_itself(tmp_path, name):
    target = written(tmp_path, "target", b"text") if name == "link" else None
    file = tmp_path / name
    file.symlink_to(target) if target else file.write_bytes(b"text")
    (piece,) = pieces_of(fsspec.filesystem("file"), str(file))
    assert piece.url == str(file) and list(documents(piece, "text", pytest.fail)) == [Document(b"text", 0)]


def test_a_name_that_no_url_finds_again_is_refused():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/odd/a::b.txt", b"text")
    with pytest.raises(ConfigError, match="a::b.txt.*rename it|chains file systems"):
        pieces_of(memory, "/odd/a::b.txt")


def test_a_store_that_fails_is_no_bad_document(tmp_path, monkeypatch):
    """It would be left out for good, because of a moment's fault."""
    table = pa.table({"text": [row["text"] * 500 for row in ROWS]})
    files = [table_file(tmp_path, form, table) for form in FORMS]
    files += [
        written(tmp_path, f"a.{name}", PACK[ending](JSONL)) for name, ending in (("jsonl", ""), ("txt.gz", ".gz"))
    ]
    for file in files:
        (piece, *_) = pieces_of(*open_source(str(file)))
        with monkeypatch.context() as patch:
            patch.setattr(pieces.open_place(str(file))[0].__class__, "open", lambda *_, file=file, **__: Failing(file))
            with pytest.raises(StorageError, match=f"{file.name}: .*the line went dead"):
                list(documents(piece, "text", pytest.fail))
        file.unlink()
        with pytest.raises(StorageError, match=f"{file.name}: not found"):
            list(documents(piece, "text", pytest.fail))


class Failing(io.FileIO):
    """A file of which the first bytes and the last ones can be read."""

    def read(self, size=-1):
        if (self.tell() > 300 and self.tell() < Path(self.name).stat().st_size - 2000) or size > 2**13:
            raise OSError("the line went dead")
        return super().read(size)


def test_all_formats_out_of_a_bucket(tmp_path, monkeypatch):
    """Also in an archive in it, in pieces, and by a name with odd letters."""
    monkeypatch.setattr("workers.data.documents.PIECE_BYTES", 500)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    table = pa.table({"text": [row["text"] for row in ROWS]})
    files = [table_file(tmp_path, form, table) for form in FORMS]
    files += [written(tmp_path, f"a b#c.jsonl{ending}", PACK[ending](JSONL)) for ending in PACK]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/b.jsonl", JSONL)
    (tmp_path / "served").mkdir()
    with seaweedfs(tmp_path / "served") as endpoint:
        store = Store("s3://raymuon/documents", endpoint)
        store.probe()
        for file in (*files, tmp_path / "a.zip", written(tmp_path, "empty.txt", b"")):
            store.put(file.name, file.read_bytes())
        places = [f"s3://raymuon/documents/{file.name}" for file in files]
        found = [(fs, path) for place in places for fs, path in files_of_urls([place], (), endpoint)]
        found += files_of_urls(["zip://in/*::s3://raymuon/documents/a.zip"], (), endpoint)
        assert len(found) == len(places) + 1
        for fs, path in found:
            cut = pieces_of(fs, path, s3_endpoint=endpoint)
            rows, bad = rows_of(pickle.loads(pickle.dumps(cut)))
            assert rows == list(zip(TEXTS, range(1, len(TEXTS) + 1), strict=True)) and not bad, path
        assert read("s3://raymuon/documents/empty.txt", endpoint=endpoint) == ([], [])
    with pytest.raises(StorageError, match="b.jsonl"):
        rows_of(cut)


def test_memory_stays_flat_over_files_of_any_size(tmp_path):
    """Of 150 MB in each format; a process that holds only a part grows far less."""
    text = np.random.default_rng(0).integers(97, 122, 2**20, dtype=np.uint8).tobytes().decode()
    texts = [text[i * 1000 : i * 1000 + 4000] for i in range(1000)]
    row = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(row * 40)
    with zstandard.open(tmp_path / "b.jsonl.zst", "wb") as packed:
        for _ in range(40):
            packed.write(row)
    with pq.ParquetWriter(tmp_path / "c.parquet", pa.schema([("text", pa.string())]), use_dictionary=False) as writer:
        writer.write_table(pa.table({"text": texts * 40}), row_group_size=10**6)
    program = (
        "import resource, sys\n"
        "from workers.common.storage import open_source\n"
        "from workers.data.documents import documents, pieces_of\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count = sum(1 for p in pieces_of(*open_source(sys.argv[1])) for _ in documents(p, 'text', sys.exit))\n"
        "print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)\n"
    )
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        run = subprocess.run(
            [sys.executable, "-c", program, tmp_path / name], capture_output=True, text=True, check=True
        )
        count, grown = map(int, run.stdout.split())
        assert count == 40_000 and grown < 60, (name, grown)
