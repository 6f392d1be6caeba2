"""One worker process as a Ray actor: the only file of this room that knows Ray.

The step loop runs in a thread of its own; the actor's methods stay responsive meanwhile. The driver reads reports by a
long poll, so that nobody in the step's path waits for the driver, and a dead process fails its pending poll at once.

torch and deepspeed are imported when the worker prepares, not with this module: the driver imports it too.
"""

import os
import queue
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

from workers.config import StorageConfig
from workers.errors import RaymuonError, TrainingError
from workers.reports import Ended, Report, StepDone
from workers.storage import configure_s3
from workers.task import Membership, Task

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LINGER_S = 0.5
"""How long a finished step may wait to be told together with the next ones."""


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker:
    """A slot of the worker group."""

    def __init__(self) -> None:
        if not ray.get_gpu_ids():  # Ray does not hide the GPUs of a node from a worker that reserved none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # oneDNN's AMX kernels end the process on CPUs that announce AMX and do not grant it.
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        self.outbox: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.pause_requested = threading.Event()
        self.stores: dict[int, TCPStore] = {}

    def prepare(self, storage: StorageConfig) -> str:
        """Import everything that training needs, and return the node's address."""
        import workers.training  # noqa: F401  (the slow imports)

        configure_s3(storage.s3_endpoint)
        return ray.util.get_node_ip_address()

    def open_rendezvous(self, generation: int, host: str, world_size: int) -> int:
        """Hold a generation's store in this process, which will be its rank 0, and return the port."""
        from torch.distributed import TCPStore

        store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
        self.stores = {generation: store}
        return store.port

    def start(self, member: Membership, task: Task) -> None:
        """Train in a thread of its own, as a member of a generation; reports tell of the rest."""
        self.pause_requested.clear()
        threading.Thread(target=self._train, args=(member, task), name="train", daemon=True).start()

    def reports(self, timeout_s: float) -> list[Report]:
        """Return what has happened since the last call; wait up to `timeout_s` for the first report.

        Steps alone can wait a moment for more of them: fast steps must not become as many calls.
        """
        found: list[Report] = []
        with suppress(queue.Empty):
            found.append(self.outbox.get(timeout=timeout_s))
            deadline = time.monotonic() + LINGER_S
            while isinstance(found[-1], StepDone):
                found.append(self.outbox.get(timeout=max(0.0, deadline - time.monotonic())))
        return found

    def pause(self) -> None:
        """Ask all ranks, through the next boundary, to save and end."""
        self.pause_requested.set()

    def _train(self, member: Membership, task: Task) -> None:
        from workers.training import join, train

        engine = None

        def report(kind: type[Report], **fields: Any) -> None:
            self.outbox.put(kind(generation=member.generation, rank=member.rank, time=time.time(), **fields))

        # The end is reported before the engine is destroyed: that closes connections, at which the peers fail, too.
        try:
            engine = join(member, task, self.stores.get(member.generation))
            report(Ended, outcome=train(engine, task, report, self.pause_requested.is_set))
        except RaymuonError as error:
            report(Ended, outcome="failed", error=str(error), exit_code=error.exit_code)
        except Exception as error:
            traceback.print_exc()
            code = TrainingError.exit_code
            report(Ended, outcome="failed", error=f"{type(error).__name__}: {error}", exit_code=code)
        finally:
            if engine is not None:
                engine.destroy()
