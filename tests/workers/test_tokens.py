"""Samples out of shards, on a disk and in a real S3 store, held against one plain array of all tokens."""

import gc
import hashlib
import os
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jobs.stack.seaweed import s3_environment, seaweedfs
from tests.processes import ProcessHandle
from tests.servers import proxy
from workers.common.errors import StorageError
from workers.common.storage import Store
from workers.data import tokens as tokens_module
from workers.data.cache import BlockCache, node_cache
from workers.data.corpus import Corpus, Shard
from workers.data.tokens import TokenSplit

MIB = 1 << 20


def written(store: Store, lengths, dtype="uint16", block: int = MIB, seed: int = 0) -> tuple[Corpus, np.ndarray]:
    """Write shards of random tokens with their sums; return the corpus and all its tokens."""
    draw, shards, parts = np.random.default_rng(seed), [], []
    for number, length in enumerate(lengths):
        part = draw.integers(0, np.iinfo(dtype).max, length, dtype, endpoint=True)
        data = part.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        sums = b"".join(hashlib.sha256(data[i : i + block]).digest() for i in range(0, len(data), block))
        name = f"train-{number:05d}"
        store.put(f"{name}.bin", data)
        store.put(f"{name}.sums", sums)
        whole, of_sums = (hashlib.sha256(one).hexdigest() for one in (data, sums))
        shards.append(Shard(f"{name}.bin", length, whole, of_sums))
        parts.append(part)
    corpus = Corpus(store.url, "", 0, tuple(shards), (), s3_endpoint=store.s3_endpoint, dtype=dtype)
    return corpus, np.concatenate(parts)


def wanted(tokens: np.ndarray, index: int, seq_len: int) -> list[int]:
    return tokens[index * seq_len : (index + 1) * seq_len + 1].tolist()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    os.environ.update(s3_environment())
    with seaweedfs(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where this node's cache is."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    return node_cache(1.0).folder


@pytest.fixture
def remote(server, request):
    return Store(f"s3://raymuon/{request.node.name.translate({ord(c): '-' for c in '[]'})}", server)


def files_in(cache: Path) -> list[Path]:
    return [file for file in cache.glob("*/????????") if file.parent.name != "turns"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("where", ["disk", "memory", "small cache"])
def test_every_sample_is_that_of_one_plain_array(tmp_path, folder, monkeypatch, dtype, where):
    """Over borders of blocks and shards; some shards are empty, or smaller than a sample."""
    monkeypatch.setattr(tokens_module, "BLOCK", 64)
    store = Store(str(tmp_path / "shards") if where == "disk" else f"memory://{tmp_path.name}-{dtype}-{where}")
    lengths = (1000, 0, 1, 64, 5, 0, 0, 3, 2048, 129, 0)
    corpus, tokens = written(store, lengths, dtype, block=64)
    for seq_len in (1, 7, 32, 100, 1500):
        split = TokenSplit(corpus, corpus.train, seq_len, cache_gb=1e-6 if where == "small cache" else 1.0)
        assert split.num_samples == (len(tokens) - 1) // seq_len
        indices = np.random.default_rng(0).permutation(split.num_samples)
        for part in np.array_split(indices, max(1, len(indices) // 9)):
            found = split.batch(part)
            assert found.dtype == np.int64 and found.shape == (len(part), seq_len + 1)
            assert found.tolist() == [wanted(tokens, int(index), seq_len) for index in part]
        assert split.sample(0).tolist() == wanted(tokens, 0, seq_len)
        with pytest.raises(IndexError):
            split.sample(split.num_samples)
        split.close()


def test_nothing_is_read_before_it_is_wanted(tmp_path):
    """However many shards there are; and each block is compared once."""
    corpus, tokens = written(Store(str(tmp_path)), [3 * MIB // 2 + 5] * 3)
    Path(corpus.url, "train-00001.bin").unlink()
    split = TokenSplit(corpus, corpus.train, 1000)
    assert split.bytes_read == 0
    for _ in range(2):
        assert split.sample(0).tolist() == wanted(tokens, 0, 1000)
        assert split.bytes_read == MIB
    with pytest.raises(StorageError, match=r"train-00001.bin: missing"):
        split.sample(2000)
    many = TokenSplit(replace(corpus), corpus.train * 10_000, 1000)
    assert many.sample(0).tolist() == wanted(tokens, 0, 1000)


def harm(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))


@pytest.mark.parametrize("at", [0, MIB - 1, MIB, 2 * MIB + 5, 3 * MIB + 9])
def test_a_damaged_block_is_named_and_only_it_is_refused(tmp_path, at):
    corpus, tokens = written(Store(str(tmp_path)), [1000, (3 * MIB + 10) // 2])
    harm(Path(corpus.url, "train-00001.bin"), at)
    split = TokenSplit(corpus, corpus.train, 512)
    refused = set()
    split.prefetch(range(split.num_samples))
    for index in range(split.num_samples):
        try:
            assert split.sample(index).tolist() == wanted(tokens, index, 512)
        except StorageError as error:
            assert f"train-00001.bin: damaged (the SHA-256 of its MiB {at // MIB} is" in str(error)
            refused.add(index)
    first, last = 1000 + at // MIB * MIB // 2, 1000 + (at // MIB + 1) * MIB // 2 - 1
    assert refused == {i for i in range(split.num_samples) if i * 512 <= last and (i + 1) * 512 >= first}


@pytest.mark.parametrize("name", ["bin", "sums"])
@pytest.mark.parametrize("harm_of", ["cut", "empty", "longer", "gone", "another"])
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_damaged_file_is_never_training_data(tmp_path, folder, name, harm_of, place):
    store = Store(str(tmp_path / "shards") if place == "disk" else f"memory://{tmp_path.name}{name}{harm_of}")
    corpus, tokens = written(store, [MIB])
    file = f"train-00000.{name}"
    data = store.read(file)
    harms = {"cut": data[:-2], "empty": b"", "longer": data + data, "another": data[::-1]}
    if harm_of == "gone":
        store.remove(file)
    else:
        store.put(file, harms[harm_of])
    if (name, harm_of, place) == ("bin", "longer", "memory"):
        return  # What lies behind the end is never read.
    split = TokenSplit(corpus, corpus.train, 1000)
    with pytest.raises(StorageError, match=rf"{file}: (damaged.*delete it|missing)"):
        split.sample(split.num_samples - 1)
    store.put(file, data)
    split = TokenSplit(corpus, corpus.train, 1000)
    assert split.sample(split.num_samples - 1).tolist() == wanted(tokens, split.num_samples - 1, 1000)


def test_shards_without_sums_are_compared_as_a_whole_when_they_are_opened(tmp_path, folder):
    for store in (Store(str(tmp_path / "shards")), Store(f"memory://{tmp_path.name}-old")):
        corpus, tokens = written(store, [5000, 300], "uint8")
        old = replace(corpus, train=tuple(replace(shard, sums="") for shard in corpus.train))
        split = TokenSplit(old, old.train, 100)
        store.remove("train-00000.sums")
        assert split.batch(range(52)).tolist() == [wanted(tokens, i, 100) for i in range(52)]
        data = store.read("train-00001.bin")
        store.put("train-00001.bin", b"x" + data[1:])
        for copy in tmp_path.glob("node/raymuon-tokens-*/*"):
            copy.unlink()
        with pytest.raises(StorageError, match="train-00001.bin: damaged"):
            TokenSplit(old, old.train, 100)


def test_the_store_is_read_once_and_the_cache_by_whoever_comes_next(remote, folder):
    corpus, tokens = written(remote, [2 * MIB, MIB + 7777])
    first = TokenSplit(corpus, corpus.train, 2000)
    everything = np.random.default_rng(1).permutation(first.num_samples)
    for split, read in (
        (first, 2 * len(tokens)),
        (first, 2 * len(tokens)),
        (TokenSplit(corpus, corpus.train, 2000), 0),
    ):
        for part in np.array_split(everything, 40):
            assert split.batch(part).tolist() == [wanted(tokens, int(i), 2000) for i in part]
        assert split.bytes_read == read
        split.close()
    assert sum(file.stat().st_size for file in files_in(folder)) == 2 * len(tokens)


CACHE_HARMS = {
    "a byte": lambda file: harm(file, file.stat().st_size - 1),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("how", CACHE_HARMS)
def test_what_is_damaged_in_the_cache_is_read_anew(remote, folder, how):
    corpus, tokens = written(remote, [2 * MIB])
    TokenSplit(corpus, corpus.train, 3000).batch(range(100))
    block = sorted(files_in(folder))[0]
    CACHE_HARMS[how](block)
    split = TokenSplit(corpus, corpus.train, 3000)
    assert split.batch(range(100)).tolist() == [wanted(tokens, i, 3000) for i in range(100)]
    assert split.bytes_read == MIB
    if how != "a byte":  # A process compares a block once; what is shorter it sees.
        CACHE_HARMS[how](block)
        assert split.sample(100).tolist() == wanted(tokens, 100, 3000)
    (sums,) = folder.glob("*/sums")
    CACHE_HARMS[how](sums)
    CACHE_HARMS[how](block)
    split = TokenSplit(corpus, corpus.train, 3000)
    assert split.batch(range(100)).tolist() == [wanted(tokens, i, 3000) for i in range(100)]


def test_damage_in_the_store_is_named_and_not_kept(remote, folder):
    corpus, tokens = written(remote, [2 * MIB])
    data = remote.read("train-00000.bin")
    remote.put("train-00000.bin", data[: 2 * MIB + 3] + bytes([data[2 * MIB + 3] ^ 64]) + data[2 * MIB + 4 :])
    split = TokenSplit(corpus, corpus.train, 1024)
    split.prefetch(range(split.num_samples))
    with pytest.raises(StorageError, match=r"train-00000.bin: damaged \(the SHA-256 of its MiB 2 is"):
        split.sample(1024)
    assert split.sample(0).tolist() == wanted(tokens, 0, 1024)
    assert not [file for file in files_in(folder) if file.name == "00000002"]
    remote.put("train-00000.bin", data)
    assert split.sample(1024).tolist() == wanted(tokens, 1024, 1024)


def test_a_cache_smaller_than_the_corpus_is_kept_to_its_size(remote, folder):
    corpus, tokens = written(remote, [4 * MIB, 4 * MIB])
    split = TokenSplit(corpus, corpus.train, 4096, cache_gb=5 * MIB / 1e9)
    stop, sizes = threading.Event(), []

    def watch() -> None:
        while not stop.is_set():
            with BlockCache(folder, 0)._locked():  # Between two writes: a walk beside one can meet a file twice.
                sizes.append(size_of(folder))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    indices = np.random.default_rng(2).permutation(split.num_samples)[:160]
    for here, coming in zip(np.array_split(indices, 40), [*np.array_split(indices, 40)[1:], []], strict=True):
        found = split.batch(here)
        split.prefetch(coming)
        assert found.tolist() == [wanted(tokens, int(i), 4096) for i in here]
    stop.set()
    watcher.join()
    assert 2 * MIB < max(sizes) <= 5 * MIB + 100
    tiny = TokenSplit(corpus, corpus.train, 4096, cache_gb=1e-6)
    assert tiny.batch(indices[:9]).tolist() == [wanted(tokens, int(i), 4096) for i in indices[:9]]


def size_of(folder: Path) -> int:
    sizes = 0
    for below, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                sizes += Path(below, name).stat().st_size
    return sizes


def test_what_was_not_read_for_the_longest_time_goes_first(tmp_path):
    cache = BlockCache(tmp_path / "cache", 1000)
    for number in range(9):
        cache.put(f"a/{number}", b"x" * 100)
        time.sleep(0.01)
    assert cache.read("a/0") == b"x" * 100
    cache.put("b/0", b"y" * 100)
    cache.put("b/1", b"y" * 300)
    left = {str(file.relative_to(cache.folder)) for file in cache.folder.glob("[ab]/*")}
    assert left == {"a/0", "a/5", "a/6", "a/7", "a/8", "b/0", "b/1"}
    assert cache.read("a/1") is None and cache.read("b/1", 295, 999) == b"y" * 5 and cache.read("b/1", 300, 310) == b""
    cache.put("c/0", b"z" * 1001)
    assert not cache.has("c/0") and cache.has("b/1")
    cache.put("b/1", b"y" * 10)
    (cache.folder / "lock").unlink()
    cache.put("b/2", b"y" * 390)
    assert cache.has("a/0") and size_of(cache.folder) <= 1000 + 21
    cache.put("b/3", b"y" * 1000)
    assert {file.parent.name for file in cache.folder.glob("[abc]/*")} == {"b"}


def test_a_cache_that_cannot_be_written_is_only_slow(tmp_path, remote, folder):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("no folder")
    corpus, tokens = written(remote, [MIB])
    split = TokenSplit(corpus, corpus.train, 1000)
    assert split.batch([0, 5, 1000]).tolist() == [wanted(tokens, i, 1000) for i in (0, 5, 1000)]


class Reader:
    """A process of the node."""

    def __init__(self, folder: str, corpus: Corpus, cache_gb: float) -> None:
        tempfile.tempdir = folder
        self.split = TokenSplit(corpus, corpus.train, 4096, cache_gb)

    def read(self, seed: int) -> tuple[int, str]:
        digest = hashlib.sha256()
        found = {}
        for part in np.array_split(np.random.default_rng(seed).permutation(self.split.num_samples), 20):
            self.split.prefetch(part)
            for index, row in zip(part.tolist(), self.split.batch(part), strict=True):
                found[index] = row
        for index in sorted(found):
            digest.update(found[index].tobytes())
        return self.split.bytes_read, digest.hexdigest()

    def put_for_ever(self, folder: Path) -> None:
        cache, number = BlockCache(folder, 64 * MIB), 0
        while True:
            cache.put(f"x/{number:08d}", b"x" * MIB)
            number += 1


@pytest.mark.parametrize("cache_mib", [100, 6])
def test_processes_share_a_cache_whatever_its_size(tmp_path, remote, folder, cache_mib):
    corpus, tokens = written(remote, [3 * MIB, 3 * MIB])
    expected = hashlib.sha256()
    for index in range((len(tokens) - 1) // 4096):
        expected.update(tokens[index * 4096 : (index + 1) * 4096 + 1].astype(np.int64).tobytes())
    readers = [ProcessHandle(Reader, tempfile.gettempdir(), corpus, cache_mib * MIB / 1e9) for _ in range(2)]
    results = [reader.call("read", seed) for seed, reader in enumerate(readers)]
    found = [result.result(300) for result in results]
    for reader in readers:
        reader.kill()
    assert {digest for _, digest in found} == {expected.hexdigest()}
    assert size_of(folder) <= cache_mib * MIB + MIB
    if cache_mib == 100:
        assert sum(read for read, _ in found) == 2 * len(tokens), "each block came once"


def test_killed_processes_leave_nothing_that_grows_and_no_lock(tmp_path, folder):
    (folder / "x").mkdir(parents=True)
    for _ in range(5):
        process = ProcessHandle(Reader, *(str(tmp_path), Corpus(str(tmp_path), "", 0, (), ()), 1.0))
        process.call("put_for_ever", folder)
        while not files_in(folder):
            time.sleep(0.01)
        time.sleep(0.05)
        process.kill()
        process.process.join()
        began = time.monotonic()
        cache = BlockCache(folder, 8 * MIB)
        cache.put("y/00000000", b"y" * MIB)
        assert time.monotonic() - began < 5 and cache.read("y/00000000") == b"y" * MIB
        assert size_of(folder) <= 8 * MIB + 100 and not (folder / "incoming").exists()


def test_a_store_that_is_away_for_a_moment_is_waited_for(remote, folder, server):
    corpus, tokens = written(remote, [2 * MIB])
    until = [float("inf")]

    def harm_of(method: str, path: str):
        return ("lost", 503, 500)[int(time.monotonic() * 10) % 3] if time.monotonic() < until[0] else None

    with proxy(server, harm_of) as endpoint:
        away = replace(corpus, s3_endpoint=endpoint)
        split = TokenSplit(away, away.train, 1000)
        until[0] = time.monotonic() + 1.5
        split.prefetch([0, 1500])
        left = until[0] - time.monotonic()  # Less than it was where the machine is busy.
        assert split.batch([0, 1500, 900]).tolist() == [wanted(tokens, i, 1000) for i in (0, 1500, 900)]
        assert split.wait_s > 0.9 * left
        split.close()


def test_read_ahead_spares_the_wait_and_joins_neighbours(remote, folder, server):
    corpus, tokens = written(remote, [8 * MIB, MIB])
    asked = []

    def harm_of(method: str, path: str):
        asked.append(path)
        return "late"

    with proxy(server, harm_of) as endpoint:
        late = replace(corpus, s3_endpoint=endpoint)
        split = TokenSplit(late, late.train, 4096)
        split.batch([0])
        assert split.wait_s > 1
        asked.clear()
        waited = split.wait_s
        split.prefetch(range(130, 1000))
        time.sleep(0.2)
        assert split.sample(0).tolist() == wanted(tokens, 0, 4096) and split.wait_s == waited, "what is here is given"
        deadline = time.monotonic() + 20
        while split._coming and time.monotonic() < deadline:
            time.sleep(0.02)
        found = split.batch(range(130, 1000))
        assert split.wait_s == waited
        assert (found == [wanted(tokens, i, 4096) for i in range(130, 1000)]).all()
        assert len([path for path in asked if path.endswith(".bin")]) == 1, "for seven blocks"
        split.close()


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokens")]


@pytest.mark.parametrize("how", ["close", "dropped"])
def test_threads_end_with_the_object(tmp_path, folder, how, monkeypatch):
    monkeypatch.setattr(tokens_module, "BLOCK", 64)
    corpus, _ = written(Store(f"memory://{tmp_path.name}"), [20_000], block=64)
    split = TokenSplit(corpus, corpus.train, 100)
    split.prefetch(range(100))
    assert reading() and len(split._coming) <= tokens_module.AHEAD
    if how == "close":
        split.close()
    del split
    deadline = time.monotonic() + 60
    while reading() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not reading()


def test_read_ahead_is_bounded(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(tokens_module, "BLOCK", 64)
    corpus, tokens = written(Store(f"memory://{tmp_path.name}"), [50_000], block=64)
    gate = threading.Event()
    read = fsspec.filesystem("memory").cat_file
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")), "cat_file", lambda *a, **k: gate.wait(10) and read(*a[1:], **k)
    )
    split = TokenSplit(corpus, corpus.train, 10)
    split.prefetch(range(split.num_samples))
    assert 0 < len(split._coming) <= tokens_module.AHEAD
    gate.set()
    assert split.sample(4321).tolist() == wanted(tokens, 4321, 10)
    split.close()
