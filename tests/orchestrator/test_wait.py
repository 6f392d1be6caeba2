"""Whoever waits looks after the pool meanwhile, is woken by news, and gives up when the time is."""

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from orchestrator.config import ScalingConfig
from orchestrator.group import pool as pool_module
from orchestrator.group.pool import Pool
from workers.common.errors import Interrupted
from workers.common.source import training_code
from workers.common.wire import Address
from workers.config import StorageConfig
from workers.member import Ready


class Handle:
    """A process that gives its first answer when it is told to, and no other."""

    def __init__(self, answer) -> None:
        self.answer, self.first = answer, Future()

    def call(self, method: str, *arguments) -> Future:
        return self.first if method in ("prepare", "address") else Future()

    def kill(self) -> None:
        pass


class Cluster:
    """One node with any number of slots."""

    def __init__(self) -> None:
        self.started: list[Handle] = []
        self.begun = threading.Semaphore(0)

    def reserve(self) -> str:
        return "slot"

    def release(self, slot: str) -> None:
        pass

    def node_of(self, slot: str) -> str:
        return "a"

    def hand_back_keeper(self, node: str, keeper: Handle) -> None:
        keeper.kill()

    def share(self, value: Any) -> Any:
        return value

    def alive(self, node: str) -> bool:
        return True

    def draining(self) -> dict[str, float]:
        return {}

    def hand_back(self, slot: str, worker: Handle) -> None:
        worker.kill()
        self.release(slot)

    def start_worker(self, slot: str) -> Handle:
        return self._start(Ready(host="", pid=0, code=training_code()))

    def start_keeper(self, node: str, token: str, storage: StorageConfig) -> Handle:
        return self._start(Address("127.0.0.1", 1, token))

    def _start(self, answer) -> Handle:
        self.started.append(Handle(answer))
        self.begun.release()
        return self.started[-1]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def pool(cluster) -> Pool:
    return Pool(cluster, ScalingConfig(max_workers=1), StorageConfig(), "token", 10.0, print)


def test_a_process_that_is_ready_wakes_whoever_waits(cluster, pool, monkeypatch):
    """Not the next look, which is an hour away."""
    monkeypatch.setattr(pool_module, "STRETCH_S", 3600.0)

    def answer() -> None:
        for _ in range(2):
            cluster.begun.acquire()
        for handle in cluster.started:
            handle.first.set_result(handle.answer)

    threading.Thread(target=answer, daemon=True).start()
    found = Future()
    looks = []
    wait = lambda: found.set_result(pool.wait(lambda: len(pool.free) == 1, lambda: looks.append(1)))  # noqa: E731
    threading.Thread(target=wait, daemon=True).start()
    assert found.result(60) is True and len(looks) >= 2, "it has looked after the pool"


def test_when_the_time_is_up_the_condition_has_been_looked_at_once_more(pool):
    assert pool.wait(lambda: False, lambda: None, 0.0) is False
    assert pool.wait(lambda: True, lambda: None, 0.0) is True


def test_what_ends_the_waiting_comes_out_of_it(pool):
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise Interrupted("a person wants an end")

    with pytest.raises(Interrupted):
        pool.wait(lambda: False, look)
