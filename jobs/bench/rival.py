"""The rival of `bench recovery`: Ray Train V2, elastic, with the same engine, model and data.

Started as `python -m jobs.bench.rival CONFIG.yaml ADDRESS FOLDER RESIZE_S`. Every worker writes lines of JSON into
`FOLDER/log.jsonl`: who it is, what it has restored, and, from rank 0, each step's number, start and end. The steps run
through the same `Trainer` as ours; a checkpoint is reported every CHECKPOINT_EVERY steps.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.cluster import BenchCluster, bench_cluster
from jobs.load import load, plain_yaml
from orchestrator.config import RunConfig, absolute, task_of
from workers.common.errors import TrainingError

RIVAL_FAULTS = ("worker_kill", "node_kill", "node_add")
CHECKPOINT_EVERY = 20
CALM_STEPS = 6
"""Steps between a recovery and the next fault, on both sides."""
TUNED = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
"""The time-outs that we found to help; with them the group is also looked at for growth every 2 s, not every 60."""
PATIENCE_S = 300.0


def rival(
    config: RunConfig,
    fault: str,
    tuned: bool,
    times: int,
    say: Callable[[str], None],
) -> list[tuple[float, int, int]]:
    """Try a fault `times` times, each in a run of its own; return seconds, steps redone, bytes read from storage."""
    found = []
    for _ in range(times):
        nodes = config.scaling.max_workers - (fault == "node_add")
        with tempfile.TemporaryDirectory(prefix="raymuon-rival-") as folder, bench_cluster(nodes) as cluster:
            path = Path(folder) / "config.yaml"
            path.write_text(plain_yaml(config))
            command = [sys.executable, "-m", "jobs.bench.rival", str(path), cluster.address, folder]
            environment = {**os.environ, **(TUNED if tuned else {}), "RAY_TRAIN_V2_ENABLED": "1"}
            with (Path(folder) / "output.txt").open("w") as output:
                resize_s = "2" if tuned else "60"
                process = subprocess.Popen([*command, resize_s], env=environment, stdout=output, stderr=output)
                try:
                    measured = _measure(fault, Path(folder) / "log.jsonl", nodes, cluster, process)
                finally:
                    process.kill()
                    process.wait()
        say(f"Ray Train {'tuned' if tuned else 'default'}, {fault}: {measured[0]:.2f} s, {measured[1]} step(s) redone")
        found.append(measured)
    return found


def _measure(
    fault: str, log: Path, world_size: int, cluster: BenchCluster, process: subprocess.Popen
) -> tuple[float, int, int]:
    """Wait until the run is calm, break it, and wait for the next new step."""

    def lines() -> list[dict[str, Any]]:
        if process.poll() is not None:
            raise TrainingError(f"Ray Train ended:\n{log.with_name('output.txt').read_text()[-3000:]}")
        text = log.read_text() if log.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    deadline = time.monotonic() + PATIENCE_S
    # A checkpoint every so often: where in between the fault falls decides how much is done again.
    enough = CHECKPOINT_EVERY + CALM_STEPS + random.randrange(CHECKPOINT_EVERY)
    while not any(line.get("step", 0) >= enough and line["world_size"] == world_size for line in lines()):
        if time.monotonic() > deadline:
            raise TrainingError(f"Ray Train did not train with {world_size} workers: {lines()[-3:]}")
        time.sleep(0.05)
    newest = max(line["began"] for line in lines() if "rank" in line)
    workers = {line["rank"]: line for line in lines() if "rank" in line and line["began"] > newest - 20}
    victim = workers[max(workers)]
    match fault:
        case "worker_kill":
            at = time.time()
            os.kill(victim["pid"], signal.SIGKILL)
        case "node_kill":
            at = cluster.kill_node(victim["node"])
        case _:
            cluster.add_node()
            at = time.time()
    deadline = time.monotonic() + PATIENCE_S
    while True:
        steps = [line for line in lines() if "step" in line]
        before = [line for line in steps if line["attempt"] == victim["attempt"]]
        # A node that comes stops nobody at once: the pause counts from the old group's last step.
        last = max(line["step"] for line in before)
        after = [line for line in steps if line["attempt"] > victim["attempt"]]
        if fault == "node_add":
            after = [line for line in after if line["world_size"] > world_size]
            at = max(line["end"] for line in before)
        new = [line for line in after if line["step"] > last]
        if new:
            break
        if time.monotonic() > deadline:
            raise TrainingError(f"Ray Train did not come back from {fault}: {steps[-3:]}")
        time.sleep(0.05)
    redone = len({line["step"] for line in after if line["step"] <= last})
    storage = sum(line["bytes"] for line in lines() if "bytes" in line and line["attempt"] > victim["attempt"])
    return new[0]["start"] - at, redone, storage


# -- what runs under Ray Train -----------------------------------------------------------------------------------------


def train_loop(settings: dict[str, str]) -> None:
    """Train as one worker of Ray Train's group, until it is killed."""
    import ray
    import ray.train
    import torch

    torch.set_num_threads(1)
    from workers.checkpoint.manifest import Manifest, ShardFile, TensorSlice
    from workers.checkpoint.shards import CheckpointReader, write_shard
    from workers.common.storage import Store
    from workers.controls import Controls
    from workers.data.prepare import prepare
    from workers.engine import adopt_process_group, build_engine, default_device
    from workers.loop import Trainer
    from workers.reports import StepDone
    from workers.state import Counters, load_state, replicated_tensors, shard_map, shard_tensors
    from workers.task import Place

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    log = Path(settings["folder"]) / "log.jsonl"
    began = time.time()
    attempt = torch.tensor([began], dtype=torch.float64)
    torch.distributed.broadcast(attempt, 0)

    def tell(**line: Any) -> None:
        with log.open("a") as file:
            file.write(json.dumps({**line, "attempt": attempt.item(), "world_size": world_size}) + "\n")

    tell(rank=rank, pid=os.getpid(), node=ray.get_runtime_context().get_node_id(), began=began)
    config = absolute(load(settings["config"], []))
    task = task_of(config, prepare(config.data), settings["folder"], attempt=1, manifest=None)
    adopt_process_group()
    checkpoint = ray.train.get_checkpoint()
    engine = build_engine(task.model, task.optim, task.train, None if checkpoint else task.seed, default_device())
    counters = Counters()
    if checkpoint:
        parts = [json.loads(path.read_text()) for path in sorted(Path(checkpoint.path).glob("*.json"))]
        shards = tuple(ShardFile.decode(part["shard"]) for part in parts)
        counters = Counters(**parts[0]["counters"])
        known = Manifest("", 1, 1, counters.step, len(parts), {}, parts[0]["counters"], {}, shards)
        reader = CheckpointReader(Store(checkpoint.path), known)
        load_state(engine, reader, counters)
        tell(bytes=reader.bytes_read, restored=counters.step)
    member = Place(generation=1, rank=rank, world_size=world_size, host="", port=0, keepers=False)

    def report(kind: type, **fields: Any) -> None:
        if kind is StepDone:
            now = time.time()
            tell(step=fields["step"], start=now - fields["seconds"], end=now)

    trainer = Trainer(task, member, engine, counters, Controls(report=report))
    placed = shard_map(engine, world_size, rank)
    while True:
        trainer._step()
        if counters.step % CHECKPOINT_EVERY:
            continue
        with tempfile.TemporaryDirectory() as folder:
            values = torch.cat([t.reshape(-1) for t in (*shard_tensors(engine), *replicated_tensors(engine))]).numpy()
            tensors = {
                TensorSlice(kind, f.name, f.start, f.length): np.array(values[f.offset : f.offset + f.length])
                for kind, f in placed.fragments
                if kind != "buffer" or rank == 0
            }
            shard = write_shard(Store(folder), f"{counters.step}", rank, tensors)
            part = {"shard": shard.encode(), "counters": counters.as_dict()}
            (Path(folder) / f"{rank}.json").write_text(json.dumps(part))
            ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def main(config: str, address: str, folder: str, resize_s: str) -> None:
    """Lead the run."""
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address, log_to_driver=False)
    workers = load(config, []).scaling
    elastic: Any = (1, workers.max_workers)
    TorchTrainer(
        train_loop,
        train_loop_config={"config": config, "folder": folder},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=elastic, resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=float(resize_s)
        ),
        run_config=ray.train.RunConfig(
            storage_path=f"{folder}/ray-train", failure_config=ray.train.FailureConfig(max_failures=-1)
        ),
    ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
