"""Storage over two real S3 servers: SeaweedFS, which honours conditions, and rclone's, which ignores them."""

import io
import os
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.stack.seaweed import KEY, SECRET, s3_environment, seaweedfs
from tests.processes import ProcessHandle
from tests.servers import rclone
from workers.common.errors import StorageError
from workers.common.storage import Store, open_source
from workers.common.uploads import PART_BYTES, Bandwidth, abort_old_uploads, upload
from workers.data.files import files_of

SERVERS = {"seaweedfs": seaweedfs, "rclone": rclone}


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    os.environ.update(s3_environment())
    folder = tmp_path_factory.mktemp("s3") / "served"
    folder.mkdir()
    with SERVERS[request.param](folder) as endpoint:
        yield request.param, endpoint


@pytest.fixture
def store(server, request):
    return Store(f"s3://raymuon/{request.node.name.translate({ord(c): '-' for c in '[]'})}", server[1])


class Bytes:
    """Content of pseudo-random bytes; `fails_at` raises there."""

    def __init__(self, size: int, fails_at: int | None = None) -> None:
        self.data, self.size, self.fails_at = os.urandom(1 << 20) * (size >> 20), size, fails_at

    def read(self, start: int, stop: int) -> bytes:
        if self.fails_at is not None and start >= self.fails_at:
            raise OSError("the memory is gone")
        return self.data[start:stop]


def pending(store: Store) -> list:
    bucket, prefix, _ = store.fs.split_path(store.path())
    found = store.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", [])
    return [one for one in found if one["Key"].startswith(prefix)]


def test_the_probe_tells_which_server_keeps_two_drivers_apart(server, store):
    assert store.probe() == (server[0] == "seaweedfs")
    assert store.names("") == []


def test_create_has_one_winner_where_the_server_honours_the_condition(server, store):
    winners, barrier = [], threading.Barrier(8)

    def race(number: int) -> None:
        barrier.wait()
        if store.create("log/1.json", f"{number}".encode()):
            winners.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("log/1.json") in {f"{winner}".encode() for winner in winners}
    assert len(winners) == 1 or server[0] == "rclone"
    assert not store.create("log/1.json", b"late"), "who looks first does not overwrite, on any server"


@pytest.mark.parametrize("size", [3 << 20, 40 << 20])
def test_a_file_in_parts_and_ranges_of_it(store, size):
    content = Bytes(size)
    upload(store, "a/big", content, Bandwidth(None))
    assert store.files("a") == {"a/big": store.files("")["a/big"]} and store.files("a")["a/big"].size == size
    assert abs(store.files("a")["a/big"].modified - time.time()) < 120
    assert store.read("a/big") == content.data
    for start, stop in ((0, 10), (size // 2 - 5, size // 2 + 5), (size - 7, size)):
        assert store.read_range("a/big", start, stop) == content.data[start:stop]
    store.put("a/small", b"one")
    store.put("a/small", b"two")
    assert store.read("a/small") == b"two"
    store.remove("a/big")
    store.remove("a/big")
    assert list(store.files("a")) == ["a/small"]


ODD = ("team//runs/", "a b", "a#b", "a?b=c", "a%41b", "a%2Fb", "añb", "a*[1]{2}b", "a:b", "...")


@pytest.mark.parametrize("prefix", ODD)
def test_odd_prefixes_are_one_place_for_all_that_use_them(server, prefix):
    store = Store(f"s3://raymuon/{prefix}", server[1])
    store.probe()
    assert store.create("log/1.json", b"one")
    assert store.names("log") == ["1.json"] and list(store.files("")) == ["log/1.json"]
    upload(store, "shards/x", Bytes(1 << 20), Bandwidth(None))
    assert store.child("shards").names("") == ["x"] and store.exists("shards/x")
    for path in ("log/1.json", "shards/x"):
        store.remove(path)


def test_renewed_keys_are_read_again_by_who_has_a_client_already(server, tmp_path, monkeypatch):
    """In a thread that lives on, as a keeper's uploads have; the file is renewed twice."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def renew(secret: str) -> None:
        (tmp_path / "new").write_text(f"[default]\naws_access_key_id={KEY}\naws_secret_access_key={secret}\n")
        (tmp_path / "new").replace(file)

    store = Store("s3://raymuon/renewed", server[1])
    with ThreadPoolExecutor(1) as thread:

        def works() -> bool:
            try:
                return thread.submit(upload, store, "x", Bytes(1 << 20), Bandwidth(None)).result() is None
            except StorageError:
                return False

        for secret, good in ((SECRET, True), ("an-expired-one", False), (SECRET, True)):
            renew(secret)
            assert works() is good


def test_an_archive_is_read_from_where_it_is(store, server):
    """Without a word to the process about that server: another run's texts may be on another one."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "one")
    store.put("a.zip", packed.getvalue())
    fs, path = open_source(f"zip://*.txt::{store.url}/a.zip", server[1])
    assert [fs.cat_file(name) for name in fs.glob(path)] == [b"one"]
    ((fs, name),) = files_of(f"{store.url}/a.zip", s3_endpoint=server[1])
    assert fs.cat_file(name) == packed.getvalue()


def test_an_upload_that_fails_leaves_nothing(store):
    with pytest.raises(StorageError, match="the memory is gone"):
        upload(store, "x", Bytes(64 << 20, fails_at=48 << 20), Bandwidth(None))
    assert store.names("") == [] and pending(store) == []


class Uploader:
    """A process that uploads slowly."""

    def upload(self, store: Store) -> None:
        upload(store, "x", Bytes(64 << 20), Bandwidth(8e6))


def test_an_upload_that_is_killed_is_invisible_and_collected_later(store, server):
    """Killed when a part of it is there."""
    process = ProcessHandle(Uploader)
    uploaded = process.call("upload", store)
    while not (begun := pending(store)) or not parts_of(store, begun[0]):
        assert not uploaded.done()
        time.sleep(0.05)
    process.kill()
    process.process.join()
    assert store.names("") == [] and len(pending(store)) == 1
    assert abort_old_uploads(store, time.time() - 3600) == 0, "it may be on its way"
    assert abort_old_uploads(store, time.time() + 3600) == 1
    assert pending(store) == []


def parts_of(store: Store, begun: dict) -> list:
    bucket, _, _ = store.fs.split_path(store.path())
    return store.fs.call_s3("list_parts", Bucket=bucket, Key=begun["Key"], UploadId=begun["UploadId"]).get("Parts", [])


def test_the_bandwidth_is_shared_and_kept(store):
    bandwidth, began = Bandwidth(64e6), time.monotonic()
    uploads = [
        threading.Thread(target=upload, args=(store, f"{i}", Bytes(48 << 20), bandwidth), daemon=True) for i in range(2)
    ]
    for thread in uploads:
        thread.start()
    for thread in uploads:
        thread.join()
    # The first part goes at once, the others one after the other: 5 parts of 16 MiB at 64 MB/s.
    assert time.monotonic() - began > 5 * PART_BYTES / 64e6 * 0.95
