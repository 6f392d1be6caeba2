import functools
import operator
import pickle
import re
import struct

import fsspec
import numpy as np
import pytest

from workers.common.errors import ConfigError, StorageError
from workers.data import pieces, token_files
from workers.data.documents import documents, pieces_of, rows_before
from workers.data.token_files import token_documents

VOCAB = 1000
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
DOCUMENTS = [[5, 6, 7], [], [999], [0, 1], list(range(100, 128)), [7]]


def megatron(folder, documents, dtype="uint16", name="a", per_sequence=2, **changes):
    """Write a data set as the format's description says, each document as sequences of a few tokens."""
    sequences = [d[i : i + per_sequence] for d in documents for i in range(0, len(d), per_sequence)]
    borders = np.cumsum([0, *(-(-len(d) // per_sequence) for d in documents)])
    lengths = [len(sequence) for sequence in sequences]
    places = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], len(sequences), len(borders))
    index += np.array(lengths, "<i4").tobytes() + np.array(places, "<i8").tobytes() + borders.astype("<i8").tobytes()
    (folder / f"{name}.idx").write_bytes(index)
    (folder / f"{name}.bin").write_bytes(np.array(functools.reduce(operator.iadd, documents, []), dtype).tobytes())
    return folder / f"{name}.bin"


def read(file, format="auto", vocab_size=VOCAB):
    fs, found, bad = fsspec.filesystem("file"), [], []
    for piece in pieces_of(fs, str(file), format):
        piece = pickle.loads(pickle.dumps(piece))
        own = list(token_documents(piece, vocab_size, bad.append))
        found += [(ids.tolist(), row and row + rows_before(piece)) for ids, row in own]
    return found, bad


def told(file, **how):
    found, bad = read(file, **how)
    assert not found and len(bad) == 1 and bad[0].startswith(f"{file}: "), (found, bad)
    return bad[0]


@pytest.mark.parametrize("format", ["auto", "megatron"])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64"])
def test_megatron(tmp_path, monkeypatch, dtype, format):
    file = megatron(tmp_path, DOCUMENTS, dtype)
    wanted = [(ids, row) for row, ids in enumerate(DOCUMENTS, 1) if ids]
    for piece_bytes, at_once in ((2**26, 2**14), (20, 2**14), (20, 1), (2**26, 2)):
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(token_files, "DOCUMENTS", at_once)
        assert read(file, format) == (wanted, [])
        cut = pieces_of(fsspec.filesystem("file"), str(file), format)
        assert (len(cut) > 1) == (piece_bytes == 20) and sum(piece.size for piece in cut) <= file.stat().st_size
    assert read(file.with_suffix(".idx"), format) == ([], []), "it is read with its tokens, not once more"


def test_a_megatron_data_set_of_nothing(tmp_path):
    for data_set in ([], [[]], [[], []]):
        assert read(megatron(tmp_path, data_set)) == ([], [])


def test_ids_outside_of_the_vocabulary_are_told_by_document_and_token(tmp_path):
    file = megatron(tmp_path, [[1, 2], [3, 1000], [-1, 5], [4]], "int32")
    found, bad = read(file)
    assert found == [([1, 2], 1), ([4], 4)]
    assert bad == [
        f"{file}: document 2: token 1 has the id 1000, but the vocabulary has the ids 0 to 999",
        f"{file}: document 3: token 0 has the id -1, but the vocabulary has the ids 0 to 999",
    ]
    np.save(file := tmp_path / "a.npy", np.array([1, 2, 70_000], np.uint32))
    assert "token 2 has the id 70000" in told(file) and read(file, vocab_size=70_001)[0] == [([1, 2, 70_000], 0)]


def patched(file, at, code, *values):
    data = bytearray(file.read_bytes())
    struct.pack_into(code, data, at, *values)
    file.write_bytes(data)


HARMS = {
    "index gone": (lambda bin, idx: idx.unlink(), None),
    "index cut": (
        lambda bin, idx: idx.write_bytes(idx.read_bytes()[:-8]),
        "its .idx has .* bytes, not .* for 19 sequences",
    ),
    "index nearly gone": (lambda bin, idx: idx.write_bytes(b"MMIDIDX"), "does not begin as a Megatron index"),
    "index empty": (lambda bin, idx: idx.write_bytes(b""), "does not begin as a Megatron index"),
    "index of something else": (lambda bin, idx: idx.write_text("x" * 99), "does not begin as a Megatron index"),
    "version": (lambda bin, idx: patched(idx, 9, "<Q", 2), "of version 2; version 1 is read"),
    "floats": (lambda bin, idx: patched(idx, 17, "<B", 7), r"type float32 \(7\); integers are read"),
    "unknown code": (lambda bin, idx: patched(idx, 17, "<B", 99), "type 99; integers are read"),
    "another width": (lambda bin, idx: patched(idx, 17, "<B", 4), "they are not of one data set, or one is cut off"),
    "huge": (lambda bin, idx: patched(idx, 18, "<Q", 2**60), "its .idx has .* bytes, not"),
    "with images": (
        lambda bin, idx: idx.write_bytes(idx.read_bytes() + bytes(19)),
        "texts with images, which are not read",
    ),
    "tokens cut": (lambda bin, idx: bin.write_bytes(bin.read_bytes()[:-1]), "not of one data set, or one is cut off"),
    "tokens of another": (lambda bin, idx: bin.write_bytes(bin.read_bytes() * 2), "not of one data set"),
    "tokens empty": (lambda bin, idx: bin.write_bytes(b""), "not of one data set"),
    "first border": (lambda bin, idx: patched(idx, idx.stat().st_size - 56, "<q", 1), r"borders go from \[1, 19\]"),
    "last border": (lambda bin, idx: patched(idx, idx.stat().st_size - 8, "<q", 20), r"borders go from \[0, 20\]"),
    "a border": (lambda bin, idx: patched(idx, idx.stat().st_size - 24, "<q", -5), "documents from 1 on do not rise"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_megatron_data_set_that_is_damaged_is_told_once(tmp_path, harm):
    file = megatron(tmp_path, DOCUMENTS)
    make, why = HARMS[harm]
    make(file, file.with_suffix(".idx"))
    if why is None:
        with pytest.raises(ConfigError, match="a.bin: its format should be 'megatron', .*or the other is not there"):
            read(file, "megatron")
    else:
        assert re.search(why, told(file)) and told(file) == told(file, format="megatron")


def test_lengths_and_places_that_lead_elsewhere_lose_their_documents_alone(tmp_path):
    file = megatron(tmp_path, [[1], [2], [3], [4]])
    index = file.with_suffix(".idx")
    patched(index, 34, "<i", -1)
    patched(index, 34 + 4, "<i", 2**31 - 1)
    patched(index, 34 + 4 * 4 + 8 * 2, "<q", -2)
    found, bad = read(file)
    assert found == [([4], 4)] and len(bad) == 3
    assert all(f"document {i}: its .idx is damaged: " in message for i, message in enumerate(bad, 1))


def test_an_index_alone_is_told(tmp_path):
    file = megatron(tmp_path, DOCUMENTS)
    file.unlink()
    index = file.with_suffix(".idx")
    (piece,) = pieces_of(fsspec.filesystem("file"), str(index))
    assert "its tokens, a .bin beside it, are not there" in piece.wrong


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64", ">u2", ">i8", "uint64"])
@pytest.mark.parametrize("count", [0, 1, 100, 1001])
def test_npy(tmp_path, monkeypatch, dtype, count):
    tokens = np.random.default_rng(0).integers(0, 250, count).astype(dtype)
    np.save(file := tmp_path / "a.npy", tokens)
    for piece_bytes, block in ((2**26, 2**20), (160, 2**20), (160, 7), (2**26, 100)):
        monkeypatch.setattr(token_files, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(token_files, "BLOCK_TOKENS", block)
        found, bad = read(file)
        assert (
            functools.reduce(operator.iadd, (ids for ids, _ in found), []) == tokens.tolist()
            and not bad
            and {row for _, row in found} <= {0}
        )
    assert read(file, "npy")[0] == found and all(len(ids) <= 100 for ids, _ in found)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros((2, 3), np.uint16), r"the shape \(2, 3\); token ids have one dimension"),
        (np.array(3), r"the shape \(\)"),
        (np.zeros(3), "holds float64, not token ids"),
        (np.zeros(3, bool), "holds bool, not token ids"),
        (np.array([{}], object), "Python objects, which are never read"),
        (np.zeros(3, [("a", "u2")]), "not token ids"),
    ],
)
def test_an_npy_of_something_else(tmp_path, array, why):
    np.save(file := tmp_path / "a.npy", array, allow_pickle=True)

    assert re.search(why, told(file))


def test_an_npy_that_is_cut_or_longer(tmp_path):
    np.save(file := tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    whole = file.read_bytes()
    for cut in (6, 8, 9, 50, 127, 128, 129, len(whole) - 1):
        file.write_bytes(whole[:cut])
        message = told(file)
        assert (
            "header of its numpy array is damaged" in message
            if cut < 128
            else "promises 100 tokens of uint16, 328" in message
        )
    file.write_bytes(whole + b"\0")
    assert "promises 100 tokens" in told(file)


def test_tokens_are_no_text(tmp_path):
    np.save(tmp_path / "b.npy", np.arange(3))
    for file in (megatron(tmp_path, DOCUMENTS), tmp_path / "b.npy"):
        (piece,) = pieces_of(fsspec.filesystem("file"), str(file))
        with pytest.raises(ConfigError, match="it holds tokens, not text; put it into a source of its own"):
            list(documents(piece, "text", pytest.fail))
        file.unlink()
        with pytest.raises(StorageError, match=f"{file.name}: not found"):
            list(token_documents(piece, VOCAB, pytest.fail))
