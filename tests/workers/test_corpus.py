import json
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from workers.config import DataConfig
from workers.data import corpus as corpus_module
from workers.data.corpus import Corpus, check_corpus, load, prepare
from workers.data.tokens import TokenSplit
from workers.errors import ConfigError, StorageError


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "abcdefghij" * (20 + i))
    return folder


def config(texts, tmp_path, **changes) -> DataConfig:
    return DataConfig(source=f"{texts}/*.txt", prepared_url=str(tmp_path / "prepared"), **changes)


def splits_of(corpus: Corpus) -> dict[str, bytes]:
    """Return the tokens of both splits."""
    return {
        name: b"".join(
            np.fromfile(f"{corpus.url}/{shard.name}", dtype=np.uint8).tobytes() for shard in getattr(corpus, name)
        )
        for name in ("train", "validation")
    }


@pytest.mark.parametrize("fraction", [0.03, 0.1, 0.5, 0.9])
def test_the_end_of_each_document_is_held_out_and_both_parts_end(texts, tmp_path, fraction):
    corpus = prepare(config(texts, tmp_path, held_out_fraction=fraction))
    assert corpus.documents == 5
    documents = [file.read_bytes() for file in sorted(texts.iterdir())]
    cuts = [len(document) - round(len(document) * fraction) for document in documents]
    splits = splits_of(corpus)
    assert splits["train"] == b"".join(d[:cut] + b"\0" for d, cut in zip(documents, cuts, strict=True))
    assert splits["validation"] == b"".join(d[cut:] + b"\0" for d, cut in zip(documents, cuts, strict=True))


def test_a_document_of_which_nothing_is_held_out_does_not_end_there(texts, tmp_path):
    """Otherwise short documents would make a validation split of nothing but ends."""
    for i in range(40):
        (texts / f"short-{i}.txt").write_text("short")
    splits = splits_of(prepare(config(texts, tmp_path)))
    assert splits["train"].count(b"\0") == 45 and splits["validation"].count(b"\0") == 5
    assert b"\0\0" not in splits["validation"]
    for file in texts.glob("[0-9].txt"):
        file.unlink()
    problems = check_corpus(prepare(config(texts, tmp_path)), seq_len=16, global_batch=4)
    assert len(problems) == 1 and "held-out split has 0 tokens" in problems[0]


def test_samples_run_on_over_shards(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 100)
    many = prepare(config(texts, tmp_path))
    assert len(many.train) > 5
    whole = b"".join(np.fromfile(f"{many.url}/{s.name}", dtype=np.uint8).tobytes() for s in many.train)
    split = TokenSplit(many, many.train, seq_len=64)
    assert split.num_samples == (len(whole) - 1) // 64
    for i in range(split.num_samples):
        assert bytes(split.sample(i).astype(np.uint8)) == whole[i * 64 : i * 64 + 65]
    assert split.batch([0, 1, 2]).shape == (3, 65)


def test_prepared_once_and_again_when_the_text_changes(texts, tmp_path):
    first = prepare(config(texts, tmp_path))
    index = tmp_path / "prepared" / first.url.rsplit("/", 1)[-1] / "index.json"
    written = index.stat().st_mtime_ns
    assert prepare(config(texts, tmp_path)) == first and index.stat().st_mtime_ns == written
    (texts / "0.txt").write_text("something else")
    second = prepare(config(texts, tmp_path))
    assert second.content_hash != first.content_hash and second.url != first.url


def test_any_fsspec_url_will_do(texts):
    memory = fsspec.filesystem("memory")
    for file in texts.iterdir():
        memory.pipe_file(f"/corpus/{file.name}", file.read_bytes())
    corpus = prepare(DataConfig(source="memory://corpus", prepared_url="memory://prepared"))
    assert corpus.documents == 5 and load(corpus.url) == corpus
    assert TokenSplit(corpus, corpus.train, 64).sample(0).shape == (65,)


def test_a_folder_is_read_whole_through_links_and_once(texts, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "below").mkdir(parents=True)
    (elsewhere / "below" / "linked.txt").write_text("a document that lies on another disk")
    (texts / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(texts)
    whole = replace(config(texts, tmp_path), source=str(texts))
    assert prepare(whole).documents == 6
    (texts / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="gone.txt: not found"):
        prepare(whole)


def test_a_missing_and_an_empty_corpus_are_config_errors(texts, tmp_path):
    with pytest.raises(ConfigError, match="no file found"):
        prepare(replace(config(texts, tmp_path), source=str(tmp_path / "nowhere" / "*.txt")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "blank.txt").write_text("  \n")
    with pytest.raises(ConfigError, match="no text"):
        prepare(replace(config(texts, tmp_path), source=str(tmp_path / "empty")))


def test_a_corpus_too_small_for_the_batch_is_told(texts, tmp_path):
    corpus = prepare(config(texts, tmp_path))
    assert not check_corpus(corpus, seq_len=16, global_batch=4)
    problems = check_corpus(corpus, seq_len=256, global_batch=4000)
    assert len(problems) == 2 and "global batch (4000)" in problems[0] and "held-out" in problems[1]


def test_damaged_tokens_are_refused(texts, tmp_path):
    corpus = prepare(config(texts, tmp_path))
    path = f"{corpus.url}/{corpus.train[0].name}"
    data = bytearray(fsspec.filesystem("file").cat_file(path))
    data[3] ^= 1
    fsspec.filesystem("file").pipe_file(path, bytes(data))
    with pytest.raises(StorageError, match="damaged"):
        TokenSplit(corpus, corpus.train, 16)


def test_an_unknown_format_is_refused(texts, tmp_path):
    corpus = prepare(config(texts, tmp_path))
    index = json.loads(fsspec.filesystem("file").cat_file(f"{corpus.url}/index.json"))
    index["format"] = "raymuon-tokens-99"
    fsspec.filesystem("file").pipe_file(f"{corpus.url}/index.json", json.dumps(index).encode())
    with pytest.raises(ConfigError, match="raymuon-tokens-99"):
        load(corpus.url)


def test_a_corpus_of_the_first_format_is_read_and_never_taken_for_a_new_one(texts, tmp_path, monkeypatch):
    """Its training split has no ends of documents: it is read for replays, and every new run has one of its own."""
    monkeypatch.setattr(corpus_module, "FORMAT", "raymuon-tokens-1")
    old = prepare(config(texts, tmp_path))
    monkeypatch.undo()
    assert load(old.url) == old
    assert prepare(config(texts, tmp_path)).url != old.url


def test_the_standard_library_is_about_twelve_megabytes(tmp_path):
    corpus = prepare(DataConfig(prepared_url=str(tmp_path)))
    assert 8e6 < Corpus.tokens(corpus.train) < 20e6
