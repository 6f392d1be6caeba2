"""Real ranks for tests: processes joined by gloo.

A test's function runs as `fn(rank, world_size, *args)` in each process and may return anything that can be pickled.
"""

import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.forked import context

TIMEOUT_S = 300
"""A hang must fail the test some day; this is no measure of speed."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, device: str = "cpu") -> list[Any]:
    """Run `fn` on every rank and return the results in rank order."""
    port = context.Queue()
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, results, fn, args, device), daemon=True)
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


class Ranks:
    """Ranks that stay joined and run one function after the other: for many small examples."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._port = port = context.Queue()
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `fn` on every rank and return the results in rank order; after an error the ranks are of no use."""
        for pipe in self._pipes:
            pipe.send((fn, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} does not answer"
            result, error = pipe.recv()
            if error:
                self.close()
                raise AssertionError(f"rank {rank}:\n{error}")
            results.append(pickle.loads(result))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _serve(rank: int, world_size: int, port: Any, pipe: Any) -> None:
    with suppress(EOFError):
        join(rank, world_size, port)
        while True:
            fn, args = pipe.recv()
            try:
                pipe.send((pickle.dumps(fn(rank, world_size, *args)), ""))
            except BaseException:
                pipe.send((None, traceback.format_exc()))


def join(rank: int, world_size: int, port: Any, device: str = "cpu") -> None:
    """Form a process group; rank 0 holds the store, on a port that the system chose, and tells the others."""
    import torch
    from torch.distributed import TCPStore

    from workers.engine import join_process_group

    if rank == 0:
        store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        for _ in range(world_size - 1):
            port.put(store.port)
    else:
        store = TCPStore("127.0.0.1", port.get(timeout=TIMEOUT_S), world_size, is_master=False)
    join_process_group(rank, world_size, store, torch.device(device))


def _rank(
    rank: int, world_size: int, port: Any, results: Any, fn: Callable[..., Any], args: tuple, device: str
) -> None:
    try:
        import torch

        join(rank, world_size, port, device)
        results.put((rank, pickle.dumps(fn(rank, world_size, *args)), ""))
        torch.distributed.barrier()  # The store must outlive everybody's last collective.
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
