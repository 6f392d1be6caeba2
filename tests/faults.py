"""Members that break where a test tells them to."""

import os
import signal
import threading
import time

import psutil

from workers.member import Member

ACTIONS = ("kill", "terminate", "stop", "raise", "exit", "exit soon", "spin")


class Injected(Exception):
    pass


class FaultyMember(Member):
    """A member that does something bad when its training thread comes to a phase."""

    plan: tuple[str, int, str, int] | None = None

    def inject(self, phase: str, step: int, action: str, times: int = 1) -> None:
        """Do `action` when the thread comes to `phase` of `step` or later for the `times`-th time."""
        self.plan = phase, step, action, times

    def measure(self) -> dict[str, int]:
        """Return what a leak would show in."""
        process = psutil.Process()
        return {"rss": process.memory_info().rss, "descriptors": process.num_fds(), "threads": process.num_threads()}

    def on_mark(self, phase: str, step: int) -> None:
        super().on_mark(phase, step)
        if self.plan is not None and phase == self.plan[0] and step >= self.plan[1]:
            phase, step, action, times = self.plan
            if times > 1:
                self.plan = phase, step, action, times - 1
                return
            self.plan = None
            _do(action)


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
