"""A cluster of objects in the driver's own process: they tell what real workers and keepers do, and train nothing.

So the driver is loaded with a thousand members on a small machine, and all that it does for them is real: the polls,
the watchdog, the record, MLflow, the journal, the commits. Their shards are files of four bytes.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from orchestrator.config import ScalingConfig
from orchestrator.group.handles import Handle
from orchestrator.group.usage import Usage
from workers.checkpoint.manifest import SHARDS, WEIGHT, ShardFile, TensorSlice, place_of
from workers.common.source import training_code
from workers.common.wire import Address
from workers.config import StorageConfig
from workers.member import LINGER_S, Ready
from workers.phases import Phase
from workers.reports import Ended, Mark, Pulse, Report, Restored, ShardWritten, StepDone, Validated
from workers.task import Place, Task

WORKERS_PER_NODE = 8
NAME = "embedding.weight"
KINDS = (WEIGHT, "momentum_buffer")
SHARD = b"four"
GROUPS = ("attention_qo", "attention_kv", "experts", "shared_experts", "router", "dense", "embedding", "head", "norms")
MEASURED = (
    "mfu",
    *(f"seconds/{part}" for part in ("forward", "backward", "snapshot", "logits", "reduce", "optimizer", "gather")),
    *(f"bytes_sent/{kind}" for kind in ("reduce", "all_reduce", "all_to_all", "all_gather")),
    *("attention/max_logit", "attention/share_above_100", "expert_load/max", "expert_load/min", "expert_load/idle"),
    *(f"{what}/{group}" for what in ("update_rms", "weight_rms") for group in GROUPS),
    *(f"svd_entropy/{group}" for group in GROUPS[:6]),
)
"""What a member measures every `telemetry.every` steps (docs/telemetry.md)."""


class SimulatedCluster:
    """Nodes of eight slots each, for one run.

    Args:
        rate: steps per second that the group trains. Polls are held open as real members and keepers hold them.
        real_time: those seconds are real ones; otherwise their clock skips to what is due next as long as the driver
            keeps up, so that the driver sets the pace.
    """

    def __init__(self, rate: float, real_time: bool) -> None:
        self.rate = rate
        self.bundle: dict[str, float] = {}
        self.timer = _Timer(lambda: not real_time and self._keeps_up())
        self.step = 0
        """The last step that the group has finished."""
        self.began = 0.0
        """When training began, in seconds since the epoch."""
        self.began_at = 0.0
        """The same on the simulation's clock."""
        self.polls = 0
        """Of workers, answered."""
        self.ended = False
        self.open = 0
        """Polls of workers that wait for an answer."""
        self._slots = itertools.count()
        self._keepers: dict[str, _Keeper] = {}
        self._writer = ThreadPoolExecutor(1, "shards")
        self._shards: list[Future[None]] = []
        self._nodes: dict[int, str] = {}
        """By rank."""

    def __enter__(self) -> "SimulatedCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.end()
        self._writer.shutdown()

    def slots(self, scaling: ScalingConfig) -> "SimulatedCluster":
        """Have room for any run."""
        return self

    def room(self) -> int:
        """Return more than anybody needs."""
        return 1 << 20

    def reserve(self) -> str:
        """Give a slot, at once."""
        return str(next(self._slots))

    def node_of(self, slot: str) -> str:
        """Return the slot's node."""
        return f"node-{int(slot) // WORKERS_PER_NODE:04d}"

    def release(self, slot: str) -> None:
        """Take a slot back."""

    def hand_back(self, slot: str, worker: Handle) -> None:
        """Take a slot back with its worker."""
        worker.kill()

    def start_worker(self, slot: str) -> "_Worker":
        """Return a worker."""
        return _Worker(self, self.node_of(slot))

    def start_keeper(self, node: str, token: str, storage: StorageConfig) -> "_Keeper":
        """Return a keeper."""
        self._keepers[node] = _Keeper(self.timer, token)
        return self._keepers[node]

    def hand_back_keeper(self, node: str, keeper: Handle) -> None:
        """End it."""
        keeper.kill()

    def alive(self, node: str) -> bool:
        """All nodes live."""
        return True

    def draining(self) -> dict[str, float]:
        """No node goes away."""
        return {}

    def share(self, value: Any) -> Any:
        """Return it: all are in one process."""
        return value

    def _keeps_up(self) -> bool:
        """Tell whether the driver polls at least half of the members."""
        return self.ended or self.open >= len(self._nodes) // 2

    def join(self, rank: int, node: str, task: Task) -> None:
        """Note where a rank is; training goes on from the task's checkpoint."""
        self._nodes[rank] = node
        self.step = task.manifest.step if task.manifest else 0
        self.began, self.began_at = time.time(), self.timer.now

    def finish_step(self, place: Place, task: Task) -> StepDone:
        """Finish a step, with its checkpoint where one is due, and return rank 0's report."""
        self.step += 1
        step, every = self.step, task.checkpoint.every
        busy = any(not shard.done() for shard in self._shards)  # Then real keepers leave a checkpoint out, too.
        if step == task.train.steps or (every and step % every == 0 and not busy):
            self._shards = [
                self._writer.submit(self._keepers[node].write, task, place, rank, step)
                for rank, node in self._nodes.items()
            ]
        measures = task.telemetry.every and step % task.telemetry.every == 0
        return StepDone(
            generation=place.generation,
            rank=0,
            time=time.time(),
            step=step,
            loss=5.5 / (1 + step / 100) + 1.0,
            lr=task.recipe.learning_rate(step),
            grad_norm=1.0 + 1.0 / step,
            tokens=task.recipe.samples_before(step + 1) * task.train.seq_len,
            step_tokens=task.recipe.at(step).global_batch * task.train.seq_len,
            seconds=1.0 / self.rate,
            expert_imbalance=1.5,
            skipped=0,
            snapshot_every=1,
            snapshot_seconds=1e-3,
            measured={name: step + index / 64 for index, name in enumerate(MEASURED)} if measures else {},
        )


class _Worker:
    """Answers as `workers.member.Member` does."""

    def __init__(self, cluster: SimulatedCluster, node: str) -> None:
        self.cluster, self.node = cluster, node
        self.place: Place | None = None
        self.task: Task | None = None
        self._waiting: list[Report] = []

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        match method:
            case "prepare":
                answer.set_result(Ready(host="127.0.0.1", pid=id(self), code=training_code()))
            case "open_rendezvous":
                answer.set_result(1)
            case "start":
                rank, links, common, task = arguments
                self.place, self.task = replace(common, rank=rank, links=links), task
                self.cluster.join(rank, self.node, task)
                about = {"generation": common.generation, "rank": rank, "time": time.time()}
                self._waiting.append(Restored(**about, step=0, storage_bytes=0))
                answer.set_result(None)
            case "poll":
                self._poll(answer, arguments[0])
            case _:
                answer.set_result(True)
        return answer

    def kill(self) -> None:
        """There is nothing to end."""

    def _poll(self, answer: "Future[Any]", timeout_s: float) -> None:
        cluster, place = self.cluster, self.place
        assert place is not None
        held = LINGER_S if place.rank == 0 else timeout_s
        if self._waiting:  # The first poll; members do not answer all at the same moment.
            held *= place.rank / place.world_size
        cluster.open += 1
        cluster.timer.after(held, lambda: answer.set_result(self._pulse()))

    def _pulse(self) -> Pulse:
        cluster, place, task = self.cluster, self.place, self.task
        assert place is not None
        assert task is not None
        cluster.polls, cluster.open = cluster.polls + 1, cluster.open - 1
        reports, self._waiting = self._waiting, []
        common = {"generation": place.generation, "rank": place.rank, "time": time.time()}
        if place.rank == 0:
            due = int((cluster.timer.now - cluster.began_at) * cluster.rate)
            while cluster.step < min(due, task.train.steps):
                done = cluster.finish_step(place, task)
                reports.append(done)
                if task.train.validates(done.step):
                    reports.append(Validated(**common, step=done.step, loss=done.loss))
        if cluster.step == task.train.steps:
            cluster.ended = True
            reports.append(Ended(**common, outcome="finished", step=cluster.step))
        mark = Mark(
            generation=place.generation, step=cluster.step + 1, phase=Phase.COMPUTE, age_s=1e-3, busy_s=1e-3, cpu=1
        )
        return Pulse(reports=reports, mark=mark)


class _Keeper:
    """Answers as `orchestrator.group.keeper.Keeper` does, and writes shards."""

    def __init__(self, timer: "_Timer", token: str) -> None:
        self.timer, self.token = timer, token
        self._lock = threading.Lock()
        self._written: list[Report] = []
        self._poll: Future[Any] | None = None
        self.usage = Usage()

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        match method:
            case "address":
                answer.set_result(Address("127.0.0.1", 1, self.token))
            case "inventory":
                answer.set_result([])
            case "usage":
                answer.set_result(self.usage.sample())
            case "poll":
                with self._lock:
                    self._poll = answer
                    if self._written:
                        self._answer(answer)
                    else:
                        self.timer.after(arguments[0], lambda: self._time_is_up(answer))
            case _:
                answer.set_result(None)
        return answer

    def kill(self) -> None:
        """There is nothing to end."""

    def write(self, task: Task, place: Place, rank: int, step: int) -> None:
        """Write a rank's shard, and tell."""
        path = f"{SHARDS}/{place_of(step, task.attempt, place.generation)}-{rank:04d}.safetensors"
        file = Path(task.run_url) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(SHARD)
        entries = tuple(TensorSlice(kind, NAME, rank, 1) for kind in KINDS)
        report = ShardWritten(
            generation=place.generation,
            rank=rank,
            time=time.time(),
            step=step,
            world_size=place.world_size,
            shard=ShardFile(path, len(SHARD), 0, (sha256(SHARD).hexdigest(),), entries),
            counters={"step": step, "tokens": task.recipe.samples_before(step + 1) * task.train.seq_len, "skipped": 0},
            shapes={NAME: [place.world_size]},
        )
        with self._lock:
            self._written.append(report)
            if self._poll is not None:
                self._answer(self._poll)

    def _time_is_up(self, poll: "Future[Any]") -> None:
        with self._lock:
            if self._poll is poll:
                self._answer(poll)

    def _answer(self, poll: "Future[Any]") -> None:
        written, self._written, self._poll = self._written, [], None
        poll.set_result(written)


class _Timer:
    """Calls back at given times, from a thread of its own. Its clock is the real one, and skips what nobody waits for.

    Args:
        may_skip: tells whether it may do so now.
    """

    def __init__(self, may_skip: Callable[[], bool]) -> None:
        self.may_skip = may_skip
        self._skipped = 0.0
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="simulation", daemon=True)
        self._thread.start()

    @property
    def now(self) -> float:
        """Seconds on its clock."""
        return time.monotonic() + self._skipped

    def after(self, seconds: float, call: Callable[[], object]) -> None:
        """Call back in so many seconds."""
        with self._changed:
            heapq.heappush(self._due, (self.now + seconds, next(self._numbers), call))
            self._changed.notify()

    def end(self) -> None:
        """Call nobody back any more."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._ended:
                    return
                wait = self._due[0][0] - self.now if self._due else None
                if wait is None or (wait > 0 and not self.may_skip()):
                    self._changed.wait(wait)
                    continue
                self._skipped += max(0.0, wait)
                call = heapq.heappop(self._due)[2]
            call()
