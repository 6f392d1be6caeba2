"""A cluster of plain local processes, for the chaos tests: the real members and keepers, without Ray.

A node is a name; killing it kills all that runs there.
"""

import copy
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from orchestrator.config import ScalingConfig
from orchestrator.group.handles import Gone
from orchestrator.group.keeper import Keeper
from tests.forked import context
from workers.config import StorageConfig
from workers.member import Member


class ProcessHandle:
    """A process that runs one object and answers calls through a pipe."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self.made = make
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._dead = False
        self._next = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._dead:
                future.set_exception(Gone("its process died"))
                return future
            number, self._next = self._next, self._next + 1
            self._waiting[number] = future
            try:
                self._pipe.send((number, method, arguments))
            except OSError:
                del self._waiting[number]
                future.set_exception(Gone("its process died"))
        return future

    def kill(self) -> None:
        self.process.kill()

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, result, error = self._pipe.recv()
                with self._lock:
                    future = self._waiting.pop(number)
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        with self._lock:
            self._dead = True
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(Gone("its process died"))
        self.process.join()


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    target, lock = make(*arguments), threading.Lock()

    def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            result, error = getattr(target, method)(*arguments), None
        except Exception as raised:
            result, error = None, raised
        with lock, suppress(OSError):
            pipe.send((number, result, error))

    pool = ThreadPoolExecutor(8)
    for _ in range(8):  # All its threads at once, so that whoever counts threads sees no more of them later.
        pool.submit(time.sleep, 0.05)
    try:
        while True:
            pool.submit(answer, *pipe.recv())
    except (EOFError, OSError):
        os._exit(0)  # Whoever started us is gone.


class ProcessCluster:
    """Nodes with a number of slots each.

    Args:
        nodes: slots by node.
        member: makes a worker; fault injection passes its own.
        keeper: makes a keeper.
    """

    def __init__(
        self, nodes: dict[str, int], member: Callable[..., Any] = Member, keeper: Callable[..., Any] = Keeper
    ) -> None:
        self.nodes = dict(nodes)
        self.member, self.keeper = member, keeper
        self.going: dict[str, float] = {}
        self.processes: dict[str, list[ProcessHandle]] = {}
        self.bundle = {"CPU": 1.0}
        self._slots: dict[str, str | None] = {}
        self._next = itertools.count()

    def slots(self, scaling: ScalingConfig) -> "ProcessCluster":
        """Return it as it is for runs that reserve so much; the nodes are the same."""
        seen = copy.copy(self)
        seen.bundle = {"CPU": scaling.cpus_per_worker}
        return seen

    @property
    def started(self) -> list[ProcessHandle]:
        """All processes so far."""
        return [handle for handles in self.processes.values() for handle in handles]

    def free(self) -> dict[str, int]:
        """Return how many slots nobody has, by node."""
        taken = list(self._slots.values())
        return {node: size - taken.count(node) for node, size in self.nodes.items()}

    def room(self) -> int:
        return sum(self.nodes.values())

    def reserve(self) -> str:
        slot = f"slot-{next(self._next)}"
        self._slots[slot] = None
        return slot

    def node_of(self, slot: str) -> str | None:
        if self._slots.get(slot) is None and slot in self._slots:
            taken = list(self._slots.values())
            self._slots[slot] = next((n for n, size in self.nodes.items() if taken.count(n) < size), None)
        return self._slots.get(slot)

    def release(self, slot: str) -> None:
        self._slots.pop(slot, None)

    def hand_back(self, slot: str, worker: ProcessHandle) -> None:
        worker.kill()
        self.release(slot)

    def start_worker(self, slot: str) -> ProcessHandle:
        return self._start(self._slots[slot], self.member)

    def start_keeper(self, node: str, token: str, storage: StorageConfig) -> ProcessHandle:
        return self._start(node, self.keeper, "127.0.0.1", token, storage)

    def hand_back_keeper(self, node: str, keeper: ProcessHandle) -> None:
        keeper.kill()

    def share(self, value: Any) -> Any:
        return value

    def alive(self, node: str) -> bool:
        return node in self.nodes

    def draining(self) -> dict[str, float]:
        return dict(self.going)

    def kill_node(self, node: str) -> None:
        del self.nodes[node]
        for handle in self.processes.get(node, []):
            with suppress(ProcessLookupError, AttributeError):
                os.kill(handle.process.pid, signal.SIGKILL)

    def _start(self, node: str | None, *make: Any) -> ProcessHandle:
        handle = ProcessHandle(*make)
        if node not in self.nodes:
            handle.kill()
        self.processes.setdefault(str(node), []).append(handle)
        return handle
