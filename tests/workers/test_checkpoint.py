"""The format: any world size to any other, bitwise; damage is named; nothing is ever overwritten."""

import hashlib
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import safetensors.numpy

from optim.layout import Fragment, GroupLayout
from workers.checkpoint.manifest import BUFFER, CHUNK, Manifest, TensorSlice, place_of
from workers.checkpoint.shards import CheckpointReader, write_shard
from workers.common.errors import DamagedError, StorageError
from workers.common.storage import Store

SHAPES = {"a": [4, 6], "b": [3, 5, 7], "c": [2], "router.bias": [5]}
KINDS = ("weight", "momentum_buffer")
random = np.random.default_rng(0)
TRUTH = {(kind, name): random.standard_normal(SHAPES[name], np.float32) for kind in KINDS for name in "abc"}
TRUTH[BUFFER, "router.bias"] = random.standard_normal(5, np.float32)


def layout(world_size: int) -> GroupLayout:
    return GroupLayout.of(list("abc"), [prod(SHAPES[name]) for name in "abc"], world_size)


def save(store: Store, world_size: int, step: int = 7) -> Manifest:
    shards = []
    for rank in range(world_size):
        tensors = {
            TensorSlice(kind, f.name, f.start, f.length): TRUTH[kind, f.name].ravel()[f.start : f.stop]
            for kind in KINDS
            for f in layout(world_size).fragments(rank)
        }
        if rank == 0:
            tensors[TensorSlice(BUFFER, "router.bias", 0, 5)] = TRUTH[BUFFER, "router.bias"]
        shards.append(write_shard(store, place_of(step, 1, 1), rank, tensors))
    counters = {"step": step, "tokens": 70, "applied_steps": step}
    return Manifest("run", 1, 1, step, world_size, {"seed": 0}, counters, SHAPES, tuple(shards))


def test_every_read_is_told(tmp_path):
    """The watchdog must see that a large restore gets on."""
    store, seen = Store(str(tmp_path)), []
    reader = CheckpointReader(store, save(store, 2), lambda: seen.append(reader.bytes_read))
    for name in reader.names("weight"):
        reader.tensor("weight", name)
    assert seen == sorted(set(seen)) and len(seen) >= 2 and seen[-1] == reader.bytes_read


@pytest.mark.parametrize("before", [1, 2, 3, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_every_tensor_survives_a_change_of_world_size_bitwise(tmp_path, before, after):
    store = Store(str(tmp_path))
    manifest = save(store, before)
    manifest.check_inventory()
    reader = CheckpointReader(store, manifest)
    for rank in range(after):
        for kind in KINDS:
            fragments = layout(after).fragments(rank)
            flat = np.zeros(layout(after).partition, np.float32)
            reader.fill(kind, fragments, flat)
            for f in fragments:
                expected = TRUTH[kind, f.name].ravel()[f.start : f.stop]
                assert flat[f.offset : f.offset + f.length].tobytes() == expected.tobytes()
    read = {(kind, name): reader.tensor(kind, name).tobytes() for kind in reader.kinds for name in reader.names(kind)}
    assert read == {key: tensor.tobytes() for key, tensor in TRUTH.items()}


def test_a_manifest_reads_back_and_its_hash_guards_it(tmp_path):
    store = Store(str(tmp_path))
    manifest = save(store, 2)
    data = manifest.encode()
    store.create(manifest.path, data)
    sha256 = hashlib.sha256(data).hexdigest()
    assert Manifest.read(store, manifest.path, sha256) == manifest
    file = tmp_path / manifest.path
    file.write_bytes(data.replace(b'"step": 7', b'"step": 8', 1))
    with pytest.raises(StorageError, match="damaged"):
        Manifest.read(store, manifest.path, sha256)


def test_an_unknown_format_is_refused(tmp_path):
    store = Store(str(tmp_path))
    data = save(store, 1).encode().replace(b"raymuon-checkpoint-2", b"raymuon-checkpoint-9")
    store.create("manifests/x.json", data)
    with pytest.raises(StorageError, match="raymuon-checkpoint-9"):
        Manifest.read(store, "manifests/x.json", hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(tmp_path, harm):
    store = Store(str(tmp_path))
    manifest = save(store, 2)
    path = tmp_path / manifest.shards[1].path
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-300] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(DamagedError, match=path.name):
        CheckpointReader(store, manifest).tensor("weight", "b")
    (told,) = CheckpointReader(store, manifest).verify()
    assert path.name in told


def test_an_incomplete_inventory_is_never_committed(tmp_path):
    manifest = save(Store(str(tmp_path)), 3)
    with pytest.raises(StorageError, match="exactly once|nothing in the shards"):
        replace(manifest, shards=manifest.shards[:2]).check_inventory()
    first, *others = manifest.shards
    without_bias = replace(first, entries=tuple(e for e in first.entries if e.kind != BUFFER))
    with pytest.raises(StorageError, match="router.bias"):
        replace(manifest, shards=(without_bias, *others)).check_inventory()
    with pytest.raises(StorageError, match="exactly once"):
        replace(manifest, shards=(*manifest.shards, first)).check_inventory()
    stateless = [replace(s, entries=tuple(e for e in s.entries if e.kind != KINDS[1])) for s in manifest.shards]
    with pytest.raises(StorageError, match="no optimizer state in the shards of a, b, c"):
        replace(manifest, shards=tuple(stateless)).check_inventory()


def test_the_files_are_what_safetensors_reads(tmp_path):
    manifest = save(Store(str(tmp_path)), 2)
    for shard in manifest.shards:
        data = (tmp_path / shard.path).read_bytes()
        tensors = safetensors.numpy.load(data)
        assert len(data) == shard.size and tensors.keys() == {entry.key for entry in shard.entries}
        for entry, offset in zip(shard.entries, shard.offsets, strict=True):
            assert tensors[entry.key].tobytes() == data[offset : offset + 4 * entry.length]


def large(store: Store, values: np.ndarray) -> CheckpointReader:
    """One tensor of several chunks over two shards."""
    half = values.size // 2 - 12345
    pieces = [(0, values[:half]), (half, values[half:])]
    shards = [
        write_shard(store, place_of(1, 1, 1), rank, {TensorSlice("weight", "w", start, part.size): part})
        for rank, (start, part) in enumerate(pieces)
    ]
    shapes = {"w": [values.size]}
    return CheckpointReader(store, Manifest("run", 1, 1, 1, 2, {}, {}, shapes, tuple(shards)))


@pytest.mark.parametrize("url", ["{}", "memory://{}"])
def test_only_the_chunks_of_an_interval_are_read(tmp_path, url):
    values = random.standard_normal(10_000_000, np.float32)
    store = Store(url.format(tmp_path))
    reader = large(store, values)
    assert reader.tensor("weight", "w").tobytes() == values.tobytes()
    reader = CheckpointReader(store, reader.manifest)
    for start, length in ((4_900_000, 200_000), (0, 1), (9_999_999, 1), (3_000_000, 1_000_000)):
        before, target = reader.bytes_read, np.zeros(length + 2, np.float32)
        reader.fill("weight", [Fragment("w", start, length, 1)], target)
        assert target.tobytes() == b"\0" * 4 + values[start : start + length].tobytes() + b"\0" * 4
        assert reader.bytes_read - before <= 4 * length + 4 * CHUNK
    before = reader.bytes_read
    reader.fill("weight", [Fragment("w", 3_000_001, 5, 0)], np.zeros(5, np.float32))
    assert reader.bytes_read == before, "the chunk that was read last is at hand"


def test_damage_outside_the_interval_does_not_matter_and_inside_it_does(tmp_path):
    reader = large(Store(str(tmp_path)), random.standard_normal(10_000_000, np.float32))
    path = tmp_path / reader.manifest.shards[0].path
    data = bytearray(path.read_bytes())
    data[5 * CHUNK + 17] ^= 4
    path.write_bytes(data)
    reader.fill("weight", [Fragment("w", 0, CHUNK, 0)], np.zeros(CHUNK, np.float32))
    with pytest.raises(DamagedError, match=f"{path.name}: damaged .the SHA-256 of its MiB 5 "):
        reader.fill("weight", [Fragment("w", CHUNK, CHUNK, 0)], np.zeros(CHUNK, np.float32))
