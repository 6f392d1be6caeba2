"""A real group with its checkpoints on real S3 servers, which are killed during a save or answer as they like."""

from contextlib import contextmanager

import numpy as np
import pytest

from jobs.checkpoints import list_checkpoints, verify
from jobs.stack.seaweed import seaweedfs
from optim.config import OptimConfig
from orchestrator.log.run_log import RunLog
from tests.leading import Lead, config_of, tensors_of
from tests.processes import ProcessCluster
from tests.servers import rclone, unreliable
from workers.common.errors import Interrupted
from workers.common.storage import Store
from workers.config import StorageConfig

SERVERS = {"seaweedfs": seaweedfs, "rclone": rclone}
URL = "s3://raymuon"
FOR_EVER = 10_000
MORE = 20
"""Steps after the death: four checkpoints, so that two of them go again."""
SHARD_MB = 0.19
"""Of the tiny model at two workers."""


@contextmanager
def served(name: str, folder):
    folder.mkdir()
    with SERVERS[name](folder) as endpoint:
        yield endpoint


def lead(folder, url: str, steps: int, **changes) -> Lead:
    optim = OptimConfig(lr=1e-2, schedule="wsd", decay_fraction=0)
    scaling = {"min_workers": 2, "max_workers": 2}
    config = config_of(folder, scaling=scaling, optim=optim, train={"steps": steps}, **changes)
    return Lead(config, ProcessCluster({"a": 2}), folder, url)


@pytest.mark.parametrize("server", SERVERS)
def test_killed_during_a_save_and_gone_on_with(tmp_path, server):
    with served(server, tmp_path / "served") as endpoint:
        # A shard takes a third of a second, so most of the time one is on its way.
        slow = StorageConfig(s3_endpoint=endpoint, max_upload_mb_per_s=3 * SHARD_MB)
        first = lead(tmp_path, URL, FOR_EVER, checkpoint={"every": 5}, storage=slow)

        def kill(step: int) -> None:
            if len(first.notes.commits) >= 2 and first.cluster.nodes:
                first.cluster.kill_node("a")
                first.stop.requests = 2

        first.notes.on_step = kill
        with first, pytest.raises(Interrupted):
            first.wait()
        newest = RunLog(Store(f"{URL}/run", endpoint)).manifest()
        assert newest.step == first.notes.commits[-1]
        assert newest.shards[0].size == pytest.approx(SHARD_MB * 1e6, rel=0.1)

        end = newest.step + MORE
        quick = StorageConfig(s3_endpoint=endpoint)
        keep = {"every": 5, "keep_last": 2, "grace_s": 0}
        with lead(tmp_path, URL, end, checkpoint=keep, storage=quick) as second:
            notes = second.wait()
        assert [row.step for row in notes.rows] == [*range(newest.step + 1, end + 1)]
        assert notes.commits[-1] == end
        listed = list_checkpoints(f"{URL}/run", endpoint)
        assert [row["step"] for row in listed] == notes.commits[-2:] and not any(row["damaged"] for row in listed)
        for row in listed:
            assert verify(row["url"], endpoint).damaged == []
        held = [*second.log.store.files("shards"), *second.log.store.files("manifests")]
        assert len(held) == 2 * (2 + 1), "nothing is left of the dead attempt"
        with lead(tmp_path, str(tmp_path), end) as calm:
            calm.wait()
        expected, found = tensors_of(f"{tmp_path}/run"), tensors_of(f"{URL}/run", endpoint=endpoint)
        assert [key for key in expected if not np.array_equal(expected[key], found[key])] == []


def test_storage_that_fails_now_and_then_costs_nothing(tmp_path, seed):
    with (
        served("seaweedfs", tmp_path / "served") as endpoint,
        unreliable(endpoint, 0.2, seed) as bad,
    ):
        config = StorageConfig(s3_endpoint=bad)
        keep_all = {"every": 4, "keep_last": 0}
        one = lead(tmp_path, URL, 40, checkpoint=keep_all, storage=config, recovery={"max_failed_saves": 9})
        with one:
            notes = one.wait(400)
        print(*notes.notices, sep="\n")
        assert notes.faults == [] and [row.step for row in notes.rows] == [*range(1, 41)]
        assert notes.commits[-1] == 40 and notes.commits == sorted(set(notes.commits))
        listed = list_checkpoints(f"{URL}/run", endpoint)
        assert [row["step"] for row in listed] == notes.commits
        for row in listed:
            assert verify(row["url"], endpoint).damaged == []
