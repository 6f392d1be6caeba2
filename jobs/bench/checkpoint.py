"""Checkpoints: what a save costs training, how fast it reaches S3, and how little of it another world size reads.

Three parts, each on the state of a real run of at least 256 MB per rank, all in one call:

- the time that a save holds the training step up, against DeepSpeed's `save_checkpoint` of the same engine. Ours goes
  to S3 while training goes on; DeepSpeed writes to a local folder, which is all that it can.
- the bytes per second of a shard's way to S3, hashes included, against s3fs with the same bytes.
- the bytes that a run of another world size reads from storage, against those that it has to know.
"""

import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.cluster import bench_cluster
from jobs.bench.process import torchrun
from jobs.load import load, plain_yaml
from jobs.stack.seaweed import BUCKET, s3_environment, seaweedfs
from orchestrator.config import RunConfig, absolute
from orchestrator.driver import run
from orchestrator.log.run_log import RunLog
from orchestrator.record.events import Event, Fault, Recovery
from orchestrator.record.watcher import Watcher
from orchestrator.stop import StopSignal
from workers.checkpoint.manifest import BUFFER, Manifest
from workers.checkpoint.shards import write_shard
from workers.common.errors import ConfigError
from workers.common.storage import Store
from workers.reports import Report, StepDone

WORKERS = 2
OTHER_WORKERS = 3
SAVE_EVERY = 2
LEAST_STATE = 256 << 20
"""Bytes per rank."""
WARMUP_SAVES = 2
"""The memory of the first save and of the second, in the other half, is new: the system has to find its pages."""
MODEL = [
    "model.hidden_size=512",
    "model.num_layers=5",
    "model.moe_intermediate_size=256",
    "model.num_experts=48",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.seq_len=64",
]
"""Many small matrices: a large state whose steps two cores can do in seconds."""


@dataclass
class _Saves(Watcher):
    """Watches a run, keeps its steps' times and when each checkpoint counted, and stops it after enough of them."""

    saves: int
    say: Callable[[str], None]
    stop: StopSignal = field(default_factory=StopSignal)
    steps: list[StepDone] = field(default_factory=list)
    committed_at: dict[int, float] = field(default_factory=dict)
    storage_bytes: int = 0

    def report(self, report: Report) -> None:
        if isinstance(report, StepDone):
            self.steps.append(report)
            # One more quiet step, in which what the last save still costs is counted.
            if len(self.committed_at) >= self.saves and not self.stop.requests:
                self.stop.request()

    def committed(self, step: int, url: str) -> None:
        self.committed_at[step] = time.time()
        self.say(f"raymuon: the checkpoint of step {step} counts")

    def event(self, event: Event) -> None:
        match event:
            case Recovery():
                self.storage_bytes = event.storage_bytes
            case Fault():
                self.say(f"raymuon: a fault ({event.cause}); what is measured now is worth less")

    def warn(self, text: str) -> None:
        self.say(f"raymuon: {text}")


def checkpoint(
    overrides: list[str], repeats: int, url: str, endpoint: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all three parts.

    Args:
        overrides: of the config.
        repeats: saves of each side, and uploads of each kind.
        url: a folder on S3; empty for a SeaweedFS that lives as long as this call.
        endpoint: of an S3 store that is not AWS.
        say: takes a line about each measurement.

    Raises:
        ConfigError: the state is too small for a measurement.
    """
    with tempfile.TemporaryDirectory(prefix="raymuon-checkpoint-") as folder, _storage(url, endpoint) as (place, s3):
        config = _config(Path(folder), place, s3, overrides)
        watched, run_url = _train(config, repeats + WARMUP_SAVES, say)
        store = Store(run_url, s3)
        manifest = RunLog(store).manifest()
        assert manifest is not None
        if (size := min(shard.size for shard in manifest.shards)) < LEAST_STATE:
            raise ConfigError(f"the state of a rank has {size:,} bytes; at least {LEAST_STATE:,} are measured")
        rival = _deepspeed(Path(folder), config, repeats + WARMUP_SAVES)
        say(f"DeepSpeed: save_checkpoint took {[round(s, 2) for s in rival['seconds']]} s")
        return {
            "state_bytes_per_rank": size,
            **_stall(watched, rival["seconds"][WARMUP_SAVES:]),
            "deepspeed_bytes": rival["bytes"],
            **_bandwidth(store, manifest, repeats, say),
            **_reshaped(config, manifest, say),
        }


@contextmanager
def _storage(url: str, endpoint: str) -> Iterator[tuple[str, str]]:
    """Yield a new folder on S3, which is gone afterwards, and the store's endpoint."""
    if url:
        store = Store(url, endpoint).child(f"raymuon-bench-{secrets.token_hex(4)}")
        store.probe()
        try:
            yield store.url, endpoint
        finally:
            if store.exists():
                store.fs.rm(store.path(), recursive=True)
        return
    with tempfile.TemporaryDirectory(prefix="raymuon-seaweed-") as folder, seaweedfs(Path(folder)) as found:
        os.environ.update(s3_environment())
        yield f"s3://{BUCKET}/bench", found


def _config(folder: Path, url: str, endpoint: str, overrides: list[str]) -> RunConfig:
    fixed = [
        "run.name=bench-checkpoint",
        *MODEL,
        "train.steps=1000000",
        "train.validate_every=0",
        "train.sample_prompt=''",
        f"checkpoint.every={SAVE_EVERY}",
        "checkpoint.keep_last=1",
        # No snapshot but the saves' own: all that holds training up is theirs.
        "checkpoint.snapshot_every=1000000",
        f"checkpoint.url={url}",
        f"storage.s3_endpoint={endpoint}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"scaling.max_workers={WORKERS}",
        f"scaling.min_workers={WORKERS}",
    ]
    return absolute(load("demo", [*fixed, *overrides]))


def _train(config: RunConfig, saves: int, say: Callable[[str], None]) -> tuple[_Saves, str]:
    """Train until so many checkpoints count; return what was seen and the run's folder."""
    watched = _Saves(saves, say)
    with bench_cluster(config.scaling.max_workers) as cluster:
        result = run(config, "never", cluster.address, watched, watched.stop)
    return watched, result.checkpoint.rpartition("@")[0]


def _deepspeed(folder: Path, config: RunConfig, saves: int) -> dict[str, Any]:
    path = folder / "config.yaml"
    path.write_text(plain_yaml(config))
    return torchrun(WORKERS, "jobs.bench.deepspeed_save", path, folder / "deepspeed", saves)


def _stall(watched: _Saves, rival: list[float]) -> dict[str, Any]:
    """Compare how long the step is blocked; tell apart how much longer the steps beside the uploads take in all."""
    saves = sorted(watched.committed_at)[WARMUP_SAVES:]
    steps = {report.step: report for report in watched.steps}
    # What a step's save costs is counted in the next one: only then is it over.
    blocked = [steps[step + 1].snapshot_seconds for step in saves if step + 1 in steps]
    uploads = [(steps[step].time, watched.committed_at[step]) for step in saves if step in steps]
    beside = {
        step
        for step, report in steps.items()
        if any(report.time - report.seconds < end and report.time > begin for begin, end in uploads)
    }
    first = saves[0]
    quiet = [report.seconds for step, report in steps.items() if step >= first and step not in beside]
    normal = statistics.median(quiet)
    excess = sum(steps[step].seconds - normal for step in beside) / len(uploads)
    ours, theirs = statistics.median(blocked), statistics.median(rival)
    return {
        "stall_ratio_to_deepspeed": ours / theirs,
        "stall_seconds": ours,
        "stall_seconds_all": blocked,
        "deepspeed_stall_seconds": theirs,
        "deepspeed_stall_seconds_all": rival,
        "quiet_step_seconds": normal,
        "upload_seconds": statistics.median(end - begin for begin, end in uploads),
        "step_excess_seconds_per_save": excess,
    }


def _bandwidth(store: Store, manifest: Manifest, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Upload a shard again and again, in turns: our way, and s3fs' ways with the same bytes."""
    shard = manifest.shards[0]
    data = store.read(shard.path)
    tensors = {
        entry: np.frombuffer(data, np.float32, entry.length, offset)
        for entry, offset in zip(shard.entries, shard.offsets, strict=True)
    }
    fs, target = store.fs, store.path("bench-upload")
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        arms: dict[str, Callable[[], object]] = {
            "raymuon": lambda: write_shard(store.child("bench-upload"), "raymuon", 0, tensors),
            "s3fs_pipe_file": lambda: fs.pipe_file(f"{target}/pipe", data),
            "s3fs_put_file": lambda: fs.put_file(file.name, f"{target}/put"),
        }
        speeds: dict[str, list[float]] = {arm: [] for arm in arms}
        for round_ in range(repeats + 1):
            for arm in list(arms)[:: -1 if round_ % 2 else 1]:
                clock = time.perf_counter()
                arms[arm]()
                if round_:  # The first opens connections.
                    speeds[arm].append(len(data) / (time.perf_counter() - clock) / 1e6)
                fs.rm(target, recursive=True)
            if round_:
                say(f"upload {round_}: " + ", ".join(f"{arm} {speed[-1]:.0f} MB/s" for arm, speed in speeds.items()))
    medians = {arm: statistics.median(speed) for arm, speed in speeds.items()}
    best = max((arm for arm in arms if arm != "raymuon"), key=lambda arm: medians[arm])
    ratios = [ours / theirs for ours, theirs in zip(speeds["raymuon"], speeds[best], strict=True)]
    return {
        "bandwidth_ratio_to_s3fs": statistics.median(ratios),
        "bandwidth_mb_per_s": medians,
        "bandwidth_mb_per_s_all": {arm: [round(one, 1) for one in speed] for arm, speed in speeds.items()},
    }


def _reshaped(config: RunConfig, manifest: Manifest, say: Callable[[str], None]) -> dict[str, Any]:
    """Resume the run at another world size and compare the bytes that it read with those that it has to know."""
    scaling = replace(config.scaling, min_workers=OTHER_WORKERS, max_workers=OTHER_WORKERS)
    watched = _Saves(0, say)
    with bench_cluster(OTHER_WORKERS) as cluster:
        run(replace(config, scaling=scaling), manifest.run_id, cluster.address, watched, watched.stop)
    needed = 0
    for shard in manifest.shards:
        for entry in shard.entries:
            # Every rank has its own part of the weights and the optimizer's state, and all of the buffers.
            needed += 4 * entry.length * (OTHER_WORKERS if entry.kind == BUFFER else 1)
    say(f"resumed at {OTHER_WORKERS} workers: {watched.storage_bytes:,} bytes read, {needed:,} needed")
    return {
        "reshaped_load_read_ratio": watched.storage_bytes / needed,
        "reshaped_load_bytes": watched.storage_bytes,
        "reshaped_load_bytes_needed": needed,
        "world_sizes": [WORKERS, OTHER_WORKERS],
    }
