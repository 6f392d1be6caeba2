"""The format: any world size to any other, bitwise; damage is named; nothing is ever overwritten."""

import hashlib
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

from optim.layout import GroupLayout
from workers.checkpoint.manifest import BUFFER, Entry, Manifest
from workers.checkpoint.shards import CheckpointReader, write_shard
from workers.errors import StorageError
from workers.storage import Store

SHAPES = {"a": [4, 6], "b": [3, 5, 7], "c": [2], "router.bias": [5]}
KINDS = ("weight", "momentum_buffer")
random = np.random.default_rng(0)
TRUTH = {(kind, name): random.standard_normal(SHAPES[name], np.float32) for kind in KINDS for name in "abc"}
TRUTH[BUFFER, "router.bias"] = random.standard_normal(5, np.float32)


def layout(world_size: int) -> GroupLayout:
    return GroupLayout.of(list("abc"), [prod(SHAPES[name]) for name in "abc"], world_size)


def save(store: Store, world_size: int) -> Manifest:
    shards = []
    for rank in range(world_size):
        tensors = {
            Entry(kind, f.name, f.start, f.length): TRUTH[kind, f.name].ravel()[f.start : f.stop]
            for kind in KINDS
            for f in layout(world_size).fragments(rank)
        }
        if rank == 0:
            tensors[Entry(BUFFER, "router.bias", 0, 5)] = TRUTH[BUFFER, "router.bias"]
        shards.append(write_shard(store, f"00000007-{rank}", tensors))
    counters = {"step": 7, "tokens": 70, "applied_steps": 7}
    return Manifest("run", 1, 7, world_size, {"seed": 0}, counters, SHAPES, tuple(shards))


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
    data = save(store, 1).encode().replace(b"raymuon-checkpoint-1", b"raymuon-checkpoint-9")
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
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(StorageError, match=Path(path).name):
        CheckpointReader(store, manifest).tensor("weight", "b")


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


def test_the_files_hold_no_pickle(tmp_path):
    save(Store(str(tmp_path)), 2)
    for file in tmp_path.rglob("*.safetensors"):
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert file.read_bytes()[8 : 8 + header].strip().startswith(b"{")
