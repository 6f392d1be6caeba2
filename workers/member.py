"""One worker process: it joins one generation after another, and outlives the peers that it loses.

The step loop runs in a thread of its own; the methods stay responsive meanwhile. The driver polls: a poll returns what
has happened and where the training thread is. That there is an answer is the heartbeat; a dead process fails its
pending poll at once.

torch and deepspeed are imported when the worker prepares, not with this module: the driver imports it too.
"""

import faulthandler
import gc
import os
import queue
import re
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workers.common.errors import RaymuonError
from workers.common.source import training_code
from workers.controls import Controls, Pause
from workers.phases import Phase
from workers.reports import Ended, KeeperLost, Mark, Pulse, Report, StepDone, Terminating
from workers.task import KeeperLinks, Place, Task

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from workers.engine import Engine

LINGER_S = 0.5
"""How long a finished step may wait to be told together with the next ones."""
STACK_FILE = "raymuon-stack"
"""Name of the anonymous file into which this process writes its stacks on SIGUSR1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A worker that can become a member."""

    host: str
    pid: int
    code: str
    """Hash of the code that it trains with."""
    imports_s: float = 0.0
    """Seconds that it took to import what training needs, and to rehearse."""
    device: str = "cpu"
    """Name of its GPU, or `cpu`."""


class Member:
    """A worker of the group.

    Args:
        host: the address of its node, at which its peers reach it.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        # oneDNN's AMX kernels end the process on CPUs that announce AMX and do not grant it.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        self._host = host
        self._terminating = self._prepared = False
        self._outbox: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._begin()
        # In C, so that it works while the interpreter hangs; see Keeper.end.
        self._stacks = os.fdopen(os.memfd_create(STACK_FILE), "w")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        with suppress(ValueError):  # Only a process's main thread can.
            signal.signal(signal.SIGTERM, lambda *_: self._terminate())

    def _begin(self) -> None:
        """Know of no run."""
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._store: TCPStore | None = None
        self._generation, self._rank = 0, -1
        # With the generation that they are for: calls may overtake the one that starts it.
        self._pause = (0, Pause())
        self._links = (0, KeeperLinks())
        self._told = -1
        self._mark: tuple[int, int, Phase, float] = (0, -1, Phase.IDLE, time.monotonic())
        self._busy_s = 0.0
        self._cpu = time.process_time(), time.monotonic()

    def prepare(self, task: Task | None) -> Ready:
        """Import everything that training needs; with a task, also rehearse one step, for whoever comes later."""
        began = time.monotonic()
        from workers.training import rehearse  # The slow imports.

        if task is not None:
            rehearse(task)
        if not self._prepared:  # What was frozen once is never collected: it must not be another run's.
            gc.collect()
            gc.freeze()  # A million objects of the imports, which every later collection would walk through.
            self._prepared = True
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        seconds = time.monotonic() - began
        return Ready(host=self._host, pid=os.getpid(), code=training_code(), imports_s=seconds, device=device)

    def ping(self) -> bool:
        """Tell whether the training thread is out of its generation."""
        return self._thread is None or not self._thread.is_alive()

    def renew(self, timeout_s: float) -> bool:
        """Forget the run that this process was of, so that another one finds it as one that has just been prepared.

        No call of the earlier run may come any more: its generations have the numbers of the next one's.

        Args:
            timeout_s: how long the training thread may take to leave.

        Returns:
            Whether it can be used again; else it is to be killed.
        """
        if (thread := self._thread) is not None:
            thread.join(timeout_s)
        if self._terminating or not self.ping():
            return False
        self._outbox = queue.SimpleQueue()
        self._begin()
        if self._prepared:
            from workers.training import forget

            forget()
        return True

    def open_rendezvous(self, generation: int, world_size: int) -> int:
        """Hold a generation's store in this process, which will be its rank 0, and return the port."""
        from torch.distributed import TCPStore

        self._store = TCPStore(self._host, 0, world_size, is_master=True, wait_for_workers=False)
        return self._store.port

    def start(self, rank: int, links: KeeperLinks, common: Place, task: Task) -> None:
        """Become a member of a generation, in a thread of its own; reports tell of the rest.

        Args:
            rank: of this worker.
            links: its keeper and that one's buddy.
            common: the rest of its place.
            task: what is trained.
        """
        member = replace(common, rank=rank, links=links)
        previous, self._generation, self._rank = self._thread, member.generation, member.rank
        self._told = -1
        self._mark = (member.generation, -1, Phase.JOIN, time.monotonic())  # It may hang before it has begun.
        self._thread = threading.Thread(target=self._train, args=(member, task, previous), name="train", daemon=True)
        self._thread.start()

    def poll(self, timeout_s: float, told: int) -> Pulse:
        """Return what has happened since the last call and where training is; wait up to `timeout_s` for a report.

        Steps alone can wait a moment for more of them: fast steps must not become as many calls.

        Args:
            timeout_s: to wait.
            told: the last step whose row the driver has.
        """
        self._told = max(self._told, told)
        found: list[Report] = []
        outbox = self._outbox
        with suppress(queue.Empty):
            found.append(outbox.get(timeout=timeout_s))
            deadline = time.monotonic() + LINGER_S
            while isinstance(found[-1], StepDone):
                found.append(outbox.get(timeout=max(0.0, deadline - time.monotonic())))
        generation, step, phase, since = self._mark
        now = time.monotonic()
        (used, at), self._cpu = self._cpu, (time.process_time(), now)
        cpu = (self._cpu[0] - used) / max(now - at, 1e-3)
        mark = Mark(generation=generation, step=step, phase=phase, age_s=now - since, busy_s=self._busy_s, cpu=cpu)
        return Pulse(reports=found, mark=mark)

    def pause(self, generation: int, save: bool) -> None:
        """Ask all ranks of a generation, through the next boundary, to leave; with `save`, after a checkpoint."""
        self._pause = (generation, Pause(leave=True, save=save))

    def relink(self, generation: int, links: KeeperLinks) -> None:
        """Name another keeper, or another buddy of it."""
        self._links = (generation, links)

    def abort(self, generation: int) -> None:
        """Make whoever still waits for a lost peer of this generation give up.

        With gloo the peers' sockets do that, but for the rendezvous: whoever waits there wakes when the store is gone.
        """
        if generation == self._generation:
            self._store = None
            if (engine := self._engine) is not None:
                engine.abort()

    def _terminate(self) -> None:
        """Take a SIGTERM: a member asks to leave at the next boundary; who is idle, or is asked twice, ends."""
        if self._terminating or self.ping():
            os._exit(128 + signal.SIGTERM)
        self._terminating = True
        self._outbox.put(Terminating(generation=self._generation, rank=self._rank, time=time.time()))

    def on_mark(self, phase: Phase, step: int) -> None:
        """Note where the training thread is; fault injection overrides this."""
        self._mark = (self._generation, step, Phase(phase), time.monotonic())

    def _train(self, member: Place, task: Task, previous: threading.Thread | None) -> None:
        if previous is not None:
            previous.join()
        from workers.training import join, train

        def report(kind: type[Report], **fields: Any) -> None:
            self._outbox.put(kind(generation=member.generation, rank=member.rank, time=time.time(), **fields))

        def mark(phase: Phase, step: int) -> None:
            self.on_mark(phase, step)

        def busy(seconds: float) -> None:
            self._busy_s = 0.8 * self._busy_s + 0.2 * seconds if self._busy_s else seconds

        controls = Controls(
            report=report,
            mark=mark,
            busy=busy,
            pause=lambda: self._pause[1] if self._pause[0] == member.generation else Pause(),
            told=lambda: self._told,
            links=lambda: self._links[1] if self._links[0] == member.generation else member.links,
            keeper_lost=lambda error: report(KeeperLost, error=error),
        )
        # The end is reported before the engine is destroyed: that closes connections, at which the peers fail, too.
        try:
            mark(Phase.JOIN, -1)
            self._engine = join(member, task)
            self._engine.optimizer.register_step_post_hook(lambda *_: mark(Phase.GATHER, self._mark[1]))
            outcome, step = train(self._engine, task, member, controls)
            report(Ended, outcome=outcome, step=step)
        except RaymuonError as error:
            report(Ended, outcome="failed", error=str(error), exit_code=error.exit_code)
        except Exception as error:
            lost = _is_loss_of_a_peer(error)
            if not lost:
                traceback.print_exc()
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            text += settings_behind(text, os.environ)
            report(Ended, outcome="lost" if lost else "failed", error=text, broken=_is_broken(error))
        finally:
            self._leave()
            if self._generation == member.generation:
                self._mark = (member.generation, -1, Phase.IDLE, time.monotonic())

    def _leave(self) -> None:
        """Drop the engine and the process group, so that this process can build the next generation's."""
        from workers.engine import leave_process_group

        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.destroy()
        except Exception:
            traceback.print_exc()  # What is left of a torn engine must not keep this process from the next one.
        del engine
        try:
            leave_process_group()
        except Exception:
            traceback.print_exc()


def _is_loss_of_a_peer(error: Exception) -> bool:
    """Tell whether this is what a collective or the rendezvous raises when another process is gone."""
    import torch.distributed as dist

    text = str(error)
    return isinstance(error, (dist.DistError, ConnectionError)) or any(
        word in text for word in ("gloo", "Gloo", "Connection", "recvValue", "sendBytes", "NCCL", "ProcessGroup")
    )


def settings_behind(error: str, environment: Mapping[str, str]) -> str:
    """Return the settings of gloo and NCCL whose value an error speaks of; their own messages do not name them."""
    told = [
        f"{name}={value}"
        for name, value in sorted(environment.items())
        if name.startswith(("GLOO_", "NCCL_", "TP_"))
        and value
        and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", error)
    ]
    return f" ({', '.join(told)} in the worker's environment)" if told else ""


def _is_broken(error: Exception) -> bool:
    """Tell whether the process cannot compute any more: an error sticks to its CUDA context."""
    return "CUDA error" in str(error)
