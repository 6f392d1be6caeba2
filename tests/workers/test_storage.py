import threading
from pathlib import Path

import pytest

from workers.errors import StorageError
from workers.storage import Store, absolute_url


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_create_read_list(tmp_path, scheme):
    store = Store(str(tmp_path) if scheme == "local" else f"memory://{tmp_path.name}")
    assert store.names("log") == [] and not store.exists("log/1.json")
    assert store.create("log/1.json", b"one")
    assert store.read("log/1.json") == b"one" and store.names("log") == ["1.json"]
    assert store.child("log").read("1.json") == b"one"


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
