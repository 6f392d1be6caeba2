"""Sources become tokens: the same bytes whoever makes which group when, and nothing that is held out is learned."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from workers.common.errors import ConfigError
from workers.common.storage import Store
from workers.data import prepare as prepare_module
from workers.data.config import DataConfig, SourceConfig
from workers.data.corpus import Corpus, read_index
from workers.data.ends import DocumentEnds
from workers.data.prepare import make_group, prepare, works_of


def rows(first: int, count: int) -> list[str]:
    return [f"document {number} has é and {'x' * (number % 7)} in it" for number in range(first, first + count)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Two sources of rows that have 30 rows in common."""
    write_jsonl(tmp_path / "a-1.jsonl", rows(0, 100))
    write_jsonl(tmp_path / "a-2.jsonl.gz", rows(100, 100))
    write_jsonl(tmp_path / "b.jsonl", rows(170, 80) + rows(240, 10))
    sources = (
        SourceConfig(name="a", urls=(f"{tmp_path}/a-*",)),
        SourceConfig(name="b", urls=(f"{tmp_path}/b.jsonl",)),
    )
    return DataConfig(sources=sources, prepared_url=f"{tmp_path}/prepared", held_out_fraction=0.2)


def documents_of(corpus: Corpus, split: str) -> list[str]:
    """Return the documents of a split, as they lie in its shards."""
    content = b"".join(corpus.store.read(shard.name) for shard in getattr(corpus, split))
    assert content.endswith(b"\0")
    return [text.decode() for text in content[:-1].split(b"\0")]


def files_of(folder: Path) -> dict[str, str]:
    found = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def test_every_row_is_in_one_split_whole(data):
    a, b = prepare(data)
    assert sorted(documents_of(a, "train") + documents_of(a, "validation")) == sorted(rows(0, 200))
    assert 20 <= len(documents_of(a, "validation")) <= 60
    assert a.documents == 200 and b.documents == 90


def test_a_row_stays_on_its_side_when_the_source_grows(data, tmp_path):
    before = {*documents_of(prepare(data)[0], "validation")}
    write_jsonl(tmp_path / "a-3.jsonl", rows(1000, 100))
    after = {*documents_of(prepare(data)[0], "validation")}
    assert before <= after and len(after) > len(before)


def test_duplicates_are_left_out_across_files_and_sources_and_the_first_stays(data):
    a, b = prepare(replace(data, deduplicate=True))
    assert a.documents == 200
    assert sorted(documents_of(b, "train") + documents_of(b, "validation")) == sorted(rows(200, 50))
    assert read_index(b.store)["duplicates"] == 40


def test_where_documents_end_and_where_they_come_from(data, tmp_path):
    a, _ = prepare(data)
    ends, shard = DocumentEnds(a, a.train), a.train[0]
    found = ends.stretches(0, Corpus.tokens(a.train))
    texts = documents_of(a, "train")
    assert [one.stop - one.start for one in found] == [len(text.encode()) + 1 for text in texts]
    for one, text in zip(found, texts, strict=True):
        name = Path(one.file)
        content = gzip.decompress(name.read_bytes()) if name.suffix == ".gz" else name.read_bytes()
        assert json.loads(content.splitlines()[one.row - 1])["text"] == text
    tokens = np.frombuffer(a.store.read(shard.name), np.uint8)
    for start, stop in ((0, shard.tokens), (5, 6), (100, 400)):
        expected = np.cumsum(np.concatenate([[0], tokens[start : stop - 1] == 0]))
        assert (ends.numbers(start, stop) == expected).all()


def test_groups_may_be_made_in_any_order_and_more_than_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    prepare(data)
    wanted = files_of(tmp_path / "prepared")
    other = replace(data, prepared_url=f"{tmp_path}/other")
    for work in works_of(other):
        assert len(work.groups) >= 1
        for group in [*reversed(work.groups), work.groups[0]]:
            make_group(work, group)
    prepare(other)
    assert files_of(tmp_path / "other") == wanted
    assert not [name for name in wanted if "groups" in name or "/." in name], "nothing is left behind"


KILLED = """
import sys
from workers.data import prepare
from tests.workers.test_prepare import data_from
prepare.GROUP_BYTES = 1
made = prepare.make_group
def slowly(work, group):
    print("making", flush=True)
    return made(work, group)
prepare.make_group = slowly
prepare.prepare(data_from(sys.argv[1], sys.argv[2]))
"""


def data_from(texts: str, prepared: str) -> DataConfig:
    return DataConfig(source=texts, prepared_url=prepared)


def test_killed_and_begun_again_is_the_same(tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:02d}.txt").write_text("\n".join(rows(100 * number, 100)))
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    prepare(data_from(str(texts), f"{tmp_path}/calm"))
    command = [sys.executable, "-c", KILLED, str(texts), f"{tmp_path}/killed"]
    for after in (1, 7, 20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert process.stdout
        for _ in range(after):
            process.stdout.readline()
        time.sleep(0.001 * after)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not list((tmp_path / "killed").glob("*/index.json"))
    (work,) = works_of(data_from(str(texts), f"{tmp_path}/killed"))
    assert len(work.missing()) < len(work.groups), "what is finished is not made again"
    for name in (".train-00001.bin", "groups/.00007.json"):  # As who dies in the middle of a file leaves it.
        Path(work.store.path(f"{name}.0123456789abcdef")).write_bytes(b"half")
    prepare(data_from(str(texts), f"{tmp_path}/killed"))
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "calm"), "and nothing is left behind"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": "fine"}\n{"text": \n{"text": "fine"}\n', "bad.jsonl:2: "),
        ('{"other": "fine"}\n', "bad.jsonl:1: "),
        ("", "there is no text in them"),
        ("\n\n", "there is no text in them"),
    ],
)
def test_bad_input_is_one_message(tmp_path, content, told):
    (tmp_path / "bad.jsonl").write_text(content)
    wanted = DataConfig(source=f"{tmp_path}/bad.jsonl", prepared_url=f"{tmp_path}/prepared")
    with pytest.raises(ConfigError) as error:
        prepare(wanted)
    assert told in str(error.value)


def test_some_bad_documents_may_be_left_out_and_are_told(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\nnonsense\n{"text": "two"}\n')
    wanted = DataConfig(source=f"{tmp_path}/bad.jsonl", prepared_url=f"{tmp_path}/prepared", max_bad_documents=1)
    (corpus,) = prepare(wanted)
    index = read_index(Store(corpus.url))
    assert (index["documents"], index["bad"]) == (2, 1) and "bad.jsonl:2" in index["bad_shown"][0]


@pytest.mark.parametrize("name", ["latin.txt", "cut.jsonl.gz", "archive.txt"])
def test_what_is_no_text_never_becomes_tokens(tmp_path, name):
    content = {
        "latin.txt": "é".encode("latin-1") * 50,
        "cut.jsonl.gz": gzip.compress(json.dumps({"text": "x" * 5000}).encode())[:-20],
        "archive.txt": b"PK\x03\x04" + bytes(100),
    }[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        prepare(DataConfig(source=f"{tmp_path}/{name}", prepared_url=f"{tmp_path}/prepared"))
