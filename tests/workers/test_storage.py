import errno
import os
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.config import RunConfig, absolute, database
from orchestrator.log.run_log import FencedError, RunLog, find_commit
from orchestrator.record.journal import Journal, Row, read_journal
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store, absolute_url, open_source
from workers.common.uploads import Bandwidth, upload
from workers.data.config import DataConfig
from workers.data.prepare import prepare


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_create_read_list(tmp_path, scheme):
    store = Store(str(tmp_path) if scheme == "local" else f"memory://{tmp_path.name}")
    assert store.names("log") == [] and not store.exists("log/1.json")
    assert store.create("log/1.json", b"one")
    assert store.read("log/1.json") == b"one" and store.names("log") == ["1.json"]
    assert store.child("log").read("1.json") == b"one"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("full")])
@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_what_does_not_come_to_its_end_takes_its_files_away(tmp_path, monkeypatch, scheme, error):
    """Also where the process works in that folder."""
    monkeypatch.chdir(tmp_path)
    store = Store(str(tmp_path) if scheme == "local" else f"memory://{tmp_path.name}")
    with pytest.raises(type(error)), store.whole_or_nothing():
        store.put("model.safetensors", b"one")
        store.put("log/1.json", b"one")
        raise error
    assert not store.names("") and tmp_path.exists() == (scheme == "memory")
    with store.whole_or_nothing():
        store.put("model.safetensors", b"one")
    assert store.names("") == ["model.safetensors"]


def test_create_never_overwrites_and_has_one_winner(tmp_path):
    store, winners = Store(str(tmp_path)), []
    barrier = threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        if store.create("log/1.json", f"{number}".encode()):
            winners.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1 and store.read("log/1.json") == f"{winners[0]}".encode()
    assert store.names("log") == ["1.json"], "no temporary file is left"


def test_errors_name_the_place_and_the_way_out(tmp_path):
    with pytest.raises(StorageError, match="nothing.json: not found"):
        Store(str(tmp_path)).read("nothing.json")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match="file/sub"):
        Store(str(file)).create("sub/x", b"")


def test_probe_leaves_nothing(tmp_path):
    Store(str(tmp_path / "new")).probe()
    assert list((tmp_path / "new").iterdir()) == []


def test_local_paths_become_absolute():
    assert absolute_url("s3://bucket/x") == "s3://bucket/x"
    assert absolute_url("runs") == str(Path.cwd() / "runs")


@pytest.mark.parametrize(
    ("url", "form"),
    [
        ("s3://b", "s3://b"),
        ("s3://b/", "s3://b"),
        ("s3://b/team//runs", "s3://b/team/runs"),
        ("s3://b//team/runs///", "s3://b/team/runs"),
        ("S3://b/Team", "s3://b/Team"),
        (" s3://b/x\n", "s3://b/x"),
        ("s3://b/a b/#/?/%41/*[1]{2}/…/ñ/a:b/~/...", "s3://b/a b/#/?/%41/*[1]{2}/…/ñ/a:b/~/..."),
        ("memory://x//y/", "memory://x/y"),
        ("hdfs:///user//x", "hdfs:///user/x"),
        ("file:///x//y/../z", "/x/z"),
        ("local:///x", "/x"),
        ("/x/a::b\\c//d", "/x/a::b\\c/d"),
        ("https://host/a//b?c=../d", "https://host/a//b?c=../d"),
    ],
)
def test_a_url_has_one_form_everywhere(url, form):
    assert absolute_url(url) == form == absolute_url(form)
    if "://" in form:
        assert Store(url).url == Store(url).child("run").url.removesuffix("/run") == form


REFUSED = {
    "s3://b/team/./runs": "no folders in a store",
    "s3://b/team/..": "no folders in a store",
    "s3://b/a\\b": "a backslash",
    "s3://b/a::b": "chains file systems",
    "memory://a::b": "chains file systems",
    "s3://b/a?versionId=1": "a version",
    "s3://b/a\tb": "cannot be printed",
    "s3://b/a\udc80": "cannot be printed",
    "s3:///b/x": "names no bucket",
    "s3://": "names no bucket",
    "s3:/b/x": "a URL begins with s3://",
    "s3:b": "a URL begins with s3://",
    "s33://b/x": r"no protocol 's33'; did you mean s3://\? Known are a plain path and .*memory, .*s3",
    "nothing-of-that-kind://b": "no protocol 'nothing-of-that-kind' Known|no protocol 'nothing-of-that-kind'. Known",
}


@pytest.mark.parametrize("url", REFUSED)
@pytest.mark.parametrize(
    "use",
    [
        absolute_url,
        Store,
        find_commit,
        lambda url: prepare(DataConfig(source=url)),
        lambda url: prepare(DataConfig(prepared_url=url)),
    ],
    ids=["a command's URL", "a store", "a checkpoint", "data.source", "data.prepared_url"],
)
def test_what_no_store_would_find_again_is_refused_everywhere(url, use):
    with pytest.raises(ConfigError, match=REFUSED[url]):
        use(url)


@pytest.mark.parametrize("key", ["checkpoint", "data", "train"])
def test_a_place_that_no_other_process_sees_is_refused(key):
    """Checkpoints in it would be the keepers' own: a run trained on, and committed nothing."""
    config, section = RunConfig(), {"checkpoint": "url", "data": "prepared_url", "train": "init"}[key]
    changed = replace(getattr(config, key), **{section: "memory://x"})
    with pytest.raises(ConfigError, match=rf"{key}.{section}='memory://x': .* goes with it; name another place"):
        absolute(replace(config, **{key: changed}))


def test_a_path_that_leads_nowhere_is_told_and_no_traceback(tmp_path, monkeypatch):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path in ("~nobody-of-that-name/runs", f"{tmp_path}/circle/runs"):
        for use in (absolute_url, find_commit, lambda path: database(f"sqlite:///{path}")):
            with pytest.raises(ConfigError, match="home directory|[Ll]oop"):
                use(path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="'runs': the current folder was removed; go to another one"):
        absolute_url("runs")


def test_a_package_that_is_missing_is_named():
    with pytest.raises(StorageError, match="gs://b/x.*a package is missing here .*gcsfs.*install it"):
        Store("gs://b").read("x")


def test_text_may_lie_in_an_archive_or_behind_a_cache(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{tmp_path.name}/a.txt", b"one")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("b.txt", "two")
    chains = {f"simplecache::memory://{tmp_path.name}/a.txt": b"one", f"zip://b.txt::{tmp_path}/z.zip": b"two"}
    for url, text in chains.items():
        fs, path = open_source(url)
        assert fs.cat_file(path) == text


@pytest.mark.parametrize("folder", ["a::b", "a\\b", "s3::x", "a[1]*?", "a b#%41", "[a]"])
def test_a_folder_of_a_disk_may_have_any_name(tmp_path, folder):
    store = Store(absolute_url(str(tmp_path / folder)))
    store.probe()
    assert store.create("log/1.json", b"x")
    assert store.names("log") == ["1.json"] and list(store.files("")) == ["log/1.json"]
    assert (tmp_path / folder / "log" / "1.json").read_bytes() == b"x"


class _Forgetful(MemoryFileSystem):
    """Reads what it has written, and lists it under another name, as some stores do with odd prefixes."""

    protocol = ("forgetful",)  # type: ignore[assignment]

    def ls(self, path, detail=True, **options):
        return []


def test_the_probe_refuses_a_place_whose_listing_does_not_find_what_was_written(tmp_path):
    fsspec.register_implementation("forgetful", _Forgetful, clobber=True)
    store = Store(f"forgetful://{tmp_path.name}")
    store.create("x", b"")
    with pytest.raises(StorageError, match="not found again by listing, so no checkpoint would ever count"):
        store.probe()


@pytest.mark.parametrize("code", ["EPERM", "EOPNOTSUPP", "ENOSYS", "EMLINK"])
def test_a_disk_without_hard_links_has_one_winner_too(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "link", refuse)
    test_create_never_overwrites_and_has_one_winner(tmp_path)
    store = Store(str(tmp_path / "more"))
    assert store.probe() and store.names("") == []
    upload(store, "a/big", _Content(), Bandwidth(None))
    assert store.read("a/big") == _Content.data and store.names("a") == ["big"]
    with pytest.raises(StorageError, match="exists"):
        upload(store, "a/big", _Content(), Bandwidth(None))
    log, seen = RunLog(store), RunLog(store)
    assert log.take_over({}) == 1
    with pytest.raises(FencedError):
        seen.take_over({})
    assert RunLog(store).take_over({}) == 2


class _Content:
    data = b"abc"
    size = 3

    def read(self, start, stop):
        return self.data[start:stop]


def test_a_name_whose_content_could_not_follow_is_free_again(tmp_path, monkeypatch):
    """Of a disk without hard links: the second half of a create fails."""

    def fail(*_, **__):
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "link", fail)
    with monkeypatch.context() as broken, pytest.raises(StorageError):
        broken.setattr(Path, "replace", fail)
        Store(str(tmp_path)).create("x", b"one")
    assert list(tmp_path.iterdir()) == []
    assert Store(str(tmp_path)).create("x", b"one")


class _Together(MemoryFileSystem):
    """Answers a read only when a second one is waiting: who reads one after the other waits for ever."""

    protocol = ("together",)  # type: ignore[assignment]
    barrier = threading.Barrier(2, timeout=20)
    reads = 0

    def cat_file(self, path, start=None, end=None, **options):
        self.barrier.wait()
        type(self).reads += 1
        return super().cat_file(path, start, end, **options)


def test_a_log_and_a_journal_are_read_many_at_once_and_once(tmp_path, monkeypatch):
    fsspec.register_implementation("together", _Together, clobber=True)
    store = Store(f"together://{tmp_path.name}")
    with monkeypatch.context() as alone:
        alone.setattr(_Together.barrier, "wait", lambda: None)
        log = RunLog(store)
        for attempt in range(1, 41):
            assert log.take_over({"attempt": attempt}) == attempt
        journal = Journal(store, 1)
        for number in range(40):
            journal.add(Row("train", number, 1.0, {}))
            journal.ship()
    _Together.reads = 0
    again = RunLog(store)
    assert [entry.number for entry in again.entries] == list(range(1, 41)) and _Together.reads == 40
    again.refresh()
    assert _Together.reads == 40
    assert [line.step for line in read_journal(store, pytest.fail)] == list(range(40))
