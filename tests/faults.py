"""Members that break where a test tells them to."""

import os
import queue
import signal
import threading
import time
from dataclasses import replace

import psutil

from orchestrator.group import upload
from orchestrator.group.keeper import Keeper
from workers import member
from workers.member import Member, Ready
from workers.phases import Phase
from workers.reports import Report, Validated
from workers.task import KeeperLinks, Place, Task

ACTIONS = ("kill", "terminate", "stop", "raise", "exit", "exit soon", "spin")


class Injected(Exception):
    pass


class FaultyMember(Member):
    """A member that does something bad when its training thread comes to a phase."""

    plan: tuple[Phase, int, str, int] | None = None
    refuses = False

    def inject(self, phase: Phase, step: int, action: str, times: int = 1) -> None:
        """Do `action` when the thread comes to `phase` of `step` or later for the `times`-th time."""
        self.plan = Phase(phase), step, action, times

    def refuse(self) -> None:
        """Have the next start fail."""
        self.refuses = True

    def start(self, rank: int, links: KeeperLinks, common: Place, task: Task) -> None:
        if self.refuses:
            self.refuses = False
            raise Injected("a test kept this worker from starting")
        super().start(rank, links, common, task)

    def measure(self) -> dict[str, int]:
        """Return what a leak would show in."""
        process = psutil.Process()
        return {"rss": process.memory_info().rss, "descriptors": process.num_fds(), "threads": process.num_threads()}

    def on_mark(self, phase: Phase, step: int) -> None:
        super().on_mark(phase, step)
        if self.plan is not None and phase == self.plan[0] and step >= self.plan[1]:
            phase, step, action, times = self.plan
            if times > 1:
                self.plan = phase, step, action, times - 1
                return
            self.plan = None
            _do(action)


class EagerMember(FaultyMember):
    """One that tells of each step at once."""

    def __init__(self) -> None:
        member.LINGER_S = 0.0  # In its own process.
        super().__init__()


class ForeignMember(Member):
    """One of another version of raymuon."""

    def prepare(self, task: Task | None) -> Ready:
        return replace(super().prepare(task), code="0123456789abcdef")


class QuickKeeper(Keeper):
    """One that tries a failed upload again after moments."""

    def __init__(self, *arguments) -> None:
        upload.UPLOAD_BACKOFF_S = 0.02  # In its own process.
        super().__init__(*arguments)


class ForgetfulMember(FaultyMember):
    """One whose report of the validation of step 10 gets lost with it."""

    def __init__(self) -> None:
        super().__init__()
        self._outbox = _Forgetful()


class _Forgetful(queue.SimpleQueue[Report]):
    def put(self, item: Report, block: bool = True, timeout: float | None = None) -> None:
        if not isinstance(item, Validated) or item.step != 10:
            super().put(item, block, timeout)


def _do(action: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(1)
        case "exit soon":
            threading.Timer(0.002, os._exit, (1,)).start()
        case "raise":
            raise Injected("a test broke this worker")
        case "spin":
            while True:
                time.sleep(0)
    time.sleep(0.01)  # A signal takes a moment.
