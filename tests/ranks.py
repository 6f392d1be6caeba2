"""Real ranks for tests: processes forked from a server that has torch and deepspeed loaded, joined by gloo.

A test's function runs as `fn(rank, world_size, *args)` in each process and may return anything that can be pickled.
"""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "deepspeed", "workers.training", "tests.ranks"])
TIMEOUT_S = 300
"""A hang must fail the test some day; this is no measure of speed."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """Run `fn` on every rank and return the results in rank order."""
    # Rank 0 holds the store, on a port that the system chose, and tells the others.
    port = _context.Queue()
    results = _context.Queue()
    processes = [
        _context.Process(target=_rank, args=(rank, world_size, port, results, fn, args, device), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        collected: dict[int, Any] = {}
        for _ in processes:
            rank, result, error = results.get(timeout=TIMEOUT_S)
            if error:
                raise AssertionError(f"rank {rank}:\n{error}")
            collected[rank] = pickle.loads(result)  # Of our own making: tensors would travel by shared memory.
        return [collected[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _rank(
    rank: int, world_size: int, port: Any, results: Any, fn: Callable[..., Any], args: tuple, device: str
) -> None:
    try:
        import torch
        from torch.distributed import TCPStore

        from workers.engine import join_process_group

        torch.set_num_threads(1)
        if rank == 0:
            store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
            for _ in range(world_size - 1):
                port.put(store.port)
        else:
            store = TCPStore("127.0.0.1", port.get(timeout=TIMEOUT_S), world_size, is_master=False)
        join_process_group(rank, world_size, store, torch.device(device))
        results.put((rank, pickle.dumps(fn(rank, world_size, *args)), ""))
        torch.distributed.barrier()  # The store must outlive everybody's last collective.
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
