import hashlib
import json
import os
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from workers.common.errors import ConfigError, StorageError
from workers.data import prepare as prepare_module
from workers.data.config import DataConfig
from workers.data.corpus import SPLITS, Corpus, load
from workers.data.enough import check_corpus
from workers.data.files import files_of, files_of_urls
from workers.data.prepare import prepare as prepare_all
from workers.data.tokens import TokenSplit

RUN = "0123456789abcdef0123456789abcdef"


def read(corpus: Corpus) -> None:
    """Read all that there is to train on."""
    split = TokenSplit(corpus, corpus.train, 16)
    split.batch(range(split.num_samples))


def prepare(*arguments, **options) -> Corpus:
    """Prepare the only source."""
    (corpus,) = prepare_all(*arguments, **options)
    return corpus


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
    problems = check_corpus(prepare(config(texts, tmp_path)), seq_len=16, drawn=4)
    assert len(problems) == 1 and "held-out split of the corpus has 0 tokens" in problems[0]


def test_samples_run_on_over_shards(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)  # A file each.
    many = prepare(config(texts, tmp_path))
    assert len(many.train) > 1
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


@pytest.mark.parametrize("hidden", ["", "Last-Modified"])
def test_a_text_on_a_server_that_has_changed_is_read_again(tmp_path, hidden):
    """As long as before, and whether or not the server says when it was changed."""

    class Handler(SimpleHTTPRequestHandler):
        def send_header(self, keyword, value):
            if keyword != hidden:
                super().send_header(keyword, value)

        def log_message(self, *_):
            pass

    (tmp_path / "web").mkdir()
    file = tmp_path / "web" / "a.txt"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=file.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = f"http://127.0.0.1:{server.server_port}/a.txt"
        found = []
        for text, at in (("a" * 100, 10**9), ("a" * 100, 10**9), ("b" * 100, 10**9 + 60)):
            file.write_text(text)
            os.utime(file, (at, at))
            found.append(prepare(DataConfig(source=source, prepared_url=str(tmp_path / "prepared"))))
        server.shutdown()
    assert found[0] == found[1] and found[2].content_hash != found[0].content_hash


def test_a_text_in_an_archive_that_has_changed_is_read_again(tmp_path):
    config = DataConfig(source=f"zip://*.txt::{tmp_path}/a.zip", prepared_url=str(tmp_path / "prepared"))
    found = []
    for text in ("a" * 100, "b" * 100):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.txt", text)
        fsspec.get_filesystem_class("zip").clear_instance_cache()
        found.append(prepare(config).content_hash)
    assert found[0] != found[1]


def test_any_fsspec_url_will_do(texts):
    memory = fsspec.filesystem("memory")
    for file in texts.iterdir():
        memory.pipe_file(f"/corpus/{file.name}", file.read_bytes())
    corpus = prepare(DataConfig(source="memory://corpus", prepared_url="memory://prepared"))
    assert corpus.documents == 5 and load(corpus.store) == corpus
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


OUTPUTS = (
    *("runs/mlflow.db", "runs/mlflow.db-wal", "records.sqlite", "runs/plots/any.png", "mlruns/0/meta.yaml"),
    *("prepared/0123456789abcdef/index.json", "prepared/0123456789abcdef/train-00000.bin"),
    *(f"prepared/0123456789abcdef/{name}" for name in ("train-00000.sums", "validation-00012.ends", "keys/00001.bin")),
    *("prepared/0123456789abcdef/groups/00001.json", "prepared/0123456789abcdef/tokenizer/tokenizer_config.json"),
    "imported/tokenizer/tokenizer.json",
    *(f"kept/{RUN}/{name}" for name in ("lease.json", "log/00000001.json", "journal/0001-000001.jsonl")),
    *(f"kept/{RUN}/{name}" for name in ("manifests/00000008-0001-0002.json", "shards/a/00000-12.safetensors")),
    *(
        f"artifacts/{RUN}/artifacts/config.yaml",
        f"{RUN}.png",
        "imported/log/00000001.json",
        "ledger/0001-0001-00000.jsonl",
    ),
    *(".git/HEAD", ".venv/lib/a.py", ".notes"),
)


@pytest.mark.parametrize("source", ["{}", "{}/**", "{}/*.txt,{}/below"])
def test_what_runs_leave_and_what_is_hidden_is_no_text(tmp_path, source):
    for name in ("a.txt", "below/log.txt", "below/index.json", "below/log/1.json", "below/runs.txt"):
        write(tmp_path / name)
    before = list(names(source.format(tmp_path, tmp_path)))
    for name in OUTPUTS:
        write(tmp_path / name)
    own = (str(tmp_path / "records.sqlite"),)
    assert list(names(source.format(tmp_path, tmp_path), own)) == before and len(before) == 5
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", *OUTPUTS):
        memory.pipe_file(f"/mixed/{name}", b"x")
    assert list(names("memory://mixed", ("/mixed/records.sqlite",))) == ["/mixed/a.txt"]
    memory.rm("/mixed", recursive=True)


def test_a_hidden_folder_is_read_where_it_is_named(tmp_path):
    write(tmp_path / ".texts" / "a.txt")
    write(tmp_path / "runs" / "data" / "b.txt")
    assert len(list(names(f"{tmp_path}/.texts"))) == len(list(names(f"{tmp_path}/.t*/*"))) == 1
    assert len(list(names(f"{tmp_path}/runs/data"))) == 1, "the default's name, but a person's files"
    with pytest.raises(ConfigError, match="no file found.* hidden files do not count, nor what runs have written"):
        list(names(str(tmp_path)))


@pytest.mark.parametrize(
    "name",
    ["a, b.txt", "[a].txt", "[a]/c.txt", "what?.txt", "*.txt", "a,b/c,d.txt", "[z-a].txt", "x[", "a,,b", "{a}.txt"],
)
def test_a_name_that_is_there_stands_for_itself(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / "a")  # What would be found in its place.
    path = str(tmp_path / name)
    assert list(names(path)) == [path]
    other = write(tmp_path / "other.txt")
    assert list(names(f"{other}, {path},{other}")) == [other, path, other]
    if "/" in name:
        folder = path.rsplit("/", 1)[0]
        assert list(names(folder)) == list(names(f"{folder}/*.txt")) == [path]
    fsspec.filesystem("memory").pipe_file(f"/named/{name}", b"x")
    assert list(names(f"memory://named/{name}, memory://named/{name}")) == [f"/named/{name}"] * 2
    fsspec.filesystem("memory").rm("/named", recursive=True)


@pytest.mark.parametrize("wrong", ["nowhere.txt", "*.md", "nowhere/", "memory://nowhere"])
def test_a_part_that_finds_nothing_is_an_error_even_where_others_find(texts, wrong):
    part = wrong if "://" in wrong else f"{texts}/{wrong}"
    for source in (f"{texts},{part}", f"{part}, {texts}", f"python-stdlib,{part}"):
        with pytest.raises(ConfigError, match="no file found in '.*nowhere|no file found in '.*md"):
            list(names(source))


def test_urls_stand_each_for_itself_and_are_told_by_their_source(texts, tmp_path):
    both = write(tmp_path / "a,b.txt")
    write(tmp_path / "a")
    key = "data.sources[web].urls"

    def found(*urls):
        return [name for _, name in files_of_urls(urls, (f"{texts}/1.txt",), key=key)]

    assert found(both, f" {texts} ", both) == [both, *(f"{texts}/{i}.txt" for i in (0, 2, 3, 4)), both]
    assert len(found("python-stdlib")) > 100
    with pytest.raises(ConfigError, match=r"data.sources\[web\].urls=.*a,c.txt.: no file found; name a file"):
        found(f"{tmp_path}/a,c.txt")
    with pytest.raises(ConfigError, match=r"data.sources\[web\].urls=.*: no file found in '.*nowhere'"):
        found(both, f"{tmp_path}/nowhere")
    for nothing in ((), ("",), (both, " ")):
        with pytest.raises(ConfigError, match=r"data.sources\[web\].urls=.*name nothing"):
            found(*nothing)


def names(source, outputs=()):
    return (name for _, name in files_of(source, outputs))


def write(path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("some text")
    return str(path)


def test_a_missing_and_an_empty_corpus_are_config_errors(texts, tmp_path):
    with pytest.raises(ConfigError, match="no file found"):
        prepare(replace(config(texts, tmp_path), source=str(tmp_path / "nowhere" / "*.txt")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "blank.txt").write_text("  \n")
    with pytest.raises(ConfigError, match="no text"):
        prepare(replace(config(texts, tmp_path), source=str(tmp_path / "empty")))


def test_a_corpus_too_small_for_the_batch_is_told(texts, tmp_path):
    corpus = prepare(config(texts, tmp_path))
    assert not check_corpus(corpus, seq_len=16, drawn=4)
    problems = check_corpus(corpus, seq_len=256, drawn=4000)
    assert len(problems) == 2 and "takes of it (4000)" in problems[0] and "held-out" in problems[1]
    assert len(check_corpus(corpus, seq_len=256, drawn=0)) == 1, "what is only validated on needs no more"
    assert "source mine has" in check_corpus(replace(corpus, name="mine"), seq_len=16, drawn=4000)[0]


HARMS = {
    "a byte": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("harm", HARMS)
def test_the_advice_about_damaged_tokens_makes_the_same_ones_again(texts, tmp_path, harm):
    wanted = config(texts, tmp_path)
    corpus = prepare(wanted)
    shard = Path(corpus.url, corpus.train[0].name)
    whole = shard.read_bytes()
    HARMS[harm](shard)
    with pytest.raises(StorageError, match=r"train-00000.bin: (damaged .*; delete it|missing).*makes it again"):
        read(corpus)
    if harm == "a byte":
        shard.unlink()
    assert prepare(wanted) == corpus and shard.read_bytes() == whole
    read(corpus)


def test_what_was_left_beside_a_lost_index_is_not_trusted(texts, tmp_path):
    wanted = config(texts, tmp_path)
    corpus = prepare(wanted)
    HARMS["a byte"](Path(corpus.url, corpus.train[0].name))
    Path(corpus.url, "index.json").unlink()
    assert prepare(wanted) == corpus
    read(corpus)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: [],
        lambda index: None,
        lambda index: 3,
        lambda index: "text",
        lambda index: {},
        lambda index: {"format": index["format"]},
        lambda index: {**index, "train": None},
        lambda index: {**index, "train": [{"name": "../../x"}]},
        lambda index: {**index, "train": [{**index["train"][0], "more": 1}]},
        lambda index: {**index, "train": [{**index["train"][0], "tokens": 10}]},
        lambda index: {**index, "documents": None},
        lambda index: {**index, "content_hash": "0" * 64},
    ],
)
def test_the_advice_about_a_damaged_index_makes_it_again(texts, tmp_path, change):
    wanted = config(texts, tmp_path)
    corpus = prepare(wanted)
    index = Path(corpus.url, "index.json")
    index.write_text(json.dumps(change(json.loads(index.read_text()))))
    with pytest.raises(StorageError, match=r"index.json: damaged .*; delete it. `raymuon train` .* makes it again"):
        prepare(wanted)
    index.unlink()
    assert prepare(wanted) == corpus


def test_an_unknown_format_is_refused(texts, tmp_path):
    corpus = prepare(config(texts, tmp_path))
    index = json.loads(fsspec.filesystem("file").cat_file(f"{corpus.url}/index.json"))
    index["format"] = "raymuon-tokens-99"
    fsspec.filesystem("file").pipe_file(f"{corpus.url}/index.json", json.dumps(index).encode())
    with pytest.raises(ConfigError, match="raymuon-tokens-99"):
        load(corpus.store)


@pytest.mark.parametrize("form", ["raymuon-tokens-1", "raymuon-tokens-2"])
def test_a_corpus_of_an_older_format_is_read(texts, tmp_path, form):
    """It has no sums of blocks and no ends of documents beside its shards, and is checked whole."""
    new = prepare(config(texts, tmp_path))
    tokens = TokenSplit(new, new.train, 16).batch([0, 1])
    folder, keys = Path(new.url), ("name", "tokens", "sha256")
    index = json.loads((folder / "index.json").read_text())
    splits = {split: [{key: one[key] for key in keys} for one in index[split]] for split in SPLITS}
    content = hashlib.sha256(json.dumps([form, splits]).encode()).hexdigest()
    older = {"format": form, "content_hash": content, "source": "", "documents": new.documents, **splits}
    (folder / "index.json").write_text(json.dumps(older))
    for file in [*folder.glob("*.sums"), *folder.glob("*.ends")]:
        file.unlink()
    old = load(new.store)
    assert (TokenSplit(old, old.train, 16).batch([0, 1]) == tokens).all()
    assert prepare(config(texts, tmp_path)) == old
    if form == "raymuon-tokens-2":
        assert old.content_hash == new.content_hash, "runs of that version go on"
    HARMS["a byte"](folder / old.train[0].name)
    with pytest.raises(StorageError, match="train-00000.bin: damaged"):
        read(old)


def test_the_standard_library_is_about_twelve_megabytes(tmp_path):
    corpus = prepare(DataConfig(prepared_url=str(tmp_path)))
    assert 8e6 < Corpus.tokens(corpus.train) < 20e6
