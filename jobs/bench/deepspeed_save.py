"""The rival of `bench checkpoint`: how long DeepSpeed's own `save_checkpoint` holds the same engine up.

Started as `torchrun -m jobs.bench.deepspeed_save CONFIG.yaml FOLDER SAVES`; it trains a step before every save, so that
what is saved has just been changed, and rank 0 prints the seconds of each save, the slowest rank's, as JSON.
"""

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import rendezvous

from jobs.load import load
from jobs.tell import tell
from orchestrator.config import absolute, task_of
from workers.controls import Controls
from workers.data.prepare import prepare
from workers.task import Place
from workers.training import join, train


def main(config_path: str, folder: str, saves: int) -> None:
    """Train and save as one rank of a torchrun group."""
    config = absolute(load(config_path, []))
    store, rank, world_size = next(rendezvous("env://"))
    member = Place(generation=1, rank=rank, world_size=world_size, host="", port=0, keepers=False)
    task = task_of(config, prepare(config.data), folder, attempt=1, manifest=None)
    engine = join(member, task, store)
    seconds, size = [], 0
    for step in range(1, saves + 1):
        # The same step again and again: what it learns is of no account, what it changes is.
        train(engine, replace(task, train=replace(task.train, steps=1)), member, Controls())
        dist.barrier()
        clock = time.perf_counter()
        engine.engine.save_checkpoint(folder, tag=f"step{step}")
        taken = torch.tensor([time.perf_counter() - clock])
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        seconds.append(taken.item())
        if rank == 0:
            size = sum(file.stat().st_size for file in Path(folder).rglob("*.pt"))
            shutil.rmtree(Path(folder) / f"step{step}")
    if rank == 0:
        tell({"seconds": seconds, "bytes": size})
    engine.destroy()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
