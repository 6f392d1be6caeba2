"""Ray itself: join a cluster or start a local one, and reach its slots, nodes and processes."""

import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray._private import services
from ray._private import utils as ray_utils
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR as JOB_VARIABLE
from ray._private.state import state as global_state
from ray._private.worker import get_dashboard_url
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.job_config import JobConfig
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator.config import ScalingConfig
from orchestrator.group.handles import Gone, Handle
from orchestrator.group.keeper import Keeper
from orchestrator.group.local_ray import bare, ready_for_local_ray
from orchestrator.reach import reach
from orchestrator.stop import StopSignal
from workers.actor import Worker
from workers.common.errors import ClusterError, Interrupted
from workers.common.source import ROOT
from workers.config import StorageConfig

# Where it asks for tokens by itself Ray advises to switch that off.
logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)

LOCAL = "local"
"""The address that keeps Ray from joining whatever cluster happens to run on this machine."""
# Ray starts workers at niceness 15, behind everything else on the machine; training is what it is for. It also starts
# one for each processor at once, and ends those that are idle when slots have taken the processors: all of them.
LOCAL_CONFIG = {"worker_niceness": 0, "prestart_worker_first_driver": False}
LOOK_S = 0.5
"""How old the list of living nodes may be."""
PLACED_S = 0.1
"""How old the list of slots with a node may be."""


@dataclass(frozen=True)
class Joined:
    """A Ray that this process has joined."""

    local: bool
    """It was started for this process, and ends with it."""
    dashboard_url: str
    """As the head tells it: of a loopback address where only the head itself is listened to; empty without one."""

    def slots(self, scaling: ScalingConfig) -> "RayCluster":
        """Return the cluster as a run of this size sees it.

        Raises:
            ClusterError: a local Ray has no room for its minimum.
        """
        return RayCluster(scaling, self.local)


class _OwnCode(JobConfig):
    """Has workers import the code that the driver runs, from the folder that it is told.

    Ray would have them look into the driver's current folder first, where other code may lie under our packages' names.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        return True


def _own_code(address: str) -> _OwnCode | None:
    return None if address.startswith("ray://") else _OwnCode(_py_driver_sys_path=[str(ROOT)])


def is_local(address: str | None) -> bool:
    """Tell whether a Ray would be started on this machine, rather than one joined at `address` or RAY_ADDRESS."""
    return (address or os.environ.get("RAY_ADDRESS") or LOCAL) == LOCAL


@contextmanager
def signals_apart() -> Iterator[None]:
    """Have Ray leave our signals to us: its handlers are not put in place, and what it starts is out of their reach.

    A signal to our process group (a terminal's Ctrl-C and hang-up, `timeout`, many a service manager) would end Ray's
    processes, and all that the keepers hold, before anything is saved. So each of those that we start gets a session of
    its own, and what it starts is in there, too. The kernel still kills them when this process dies.

    Both are private to Ray: without them it raises here, and does not go on unprotected.
    """
    popen, set_handler = services.ConsolePopen, ray_utils.set_sigterm_handler
    ours = signal.getsignal(signal.SIGTERM)
    services.ConsolePopen = partial(popen, start_new_session=True)  # type: ignore[misc]
    ray_utils.set_sigterm_handler = lambda sigterm_handler: None
    try:
        yield
    finally:
        services.ConsolePopen, ray_utils.set_sigterm_handler = popen, set_handler  # type: ignore[misc]
        signal.signal(signal.SIGTERM, ours)  # Ray's library has put one before it that prints a stack.


@contextmanager
def connected(address: str | None, stop: StopSignal) -> Iterator[Joined]:
    """Join the cluster at `address` (or RAY_ADDRESS), or start a local Ray.

    Raises:
        ClusterError: no cluster answers there.
        Interrupted: a person has ended it; what Ray has started ends with this process.
    """
    local = is_local(address)
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if local:
        ready_for_local_ray()
    _reach(address)
    try:
        with signals_apart(), bare() if local else nullcontext(), stop.abruptly():
            context = ray.init(
                address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                _system_config=LOCAL_CONFIG if local else None,
                job_config=_own_code(address),  # type: ignore[arg-type]  (None is Ray's default)
            )
    except Interrupted:
        raise
    except Exception as error:  # Ray raises bare ones, too, for instance where a node does not start in time.
        if local:
            raise ClusterError(f"a local Ray could not be started: {error}") from error
        raise _no_answer(address, error) from error
    try:
        dashboard = getattr(context, "address_info", {}).get("webui_url")  # Ray Client tells of none.
        yield Joined(local, f"http://{dashboard}" if dashboard else "")
    finally:
        ray.shutdown()


def job_place() -> tuple[str, str]:
    """Return this driver's submission id and the cluster's dashboard; empty where it is no job, or there is none."""
    told = json.loads(os.environ.get(JOB_VARIABLE) or "{}")
    dashboard = get_dashboard_url() if ray.is_initialized() else None
    return told.get("metadata", {}).get("job_submission_id", ""), f"http://{dashboard}" if dashboard else ""


class RayHandle:
    """An actor."""

    def __init__(self, actor: Any) -> None:  # Ray's actor handles have no useful type.
        self._actor = actor

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of the actor."""
        future: Future[Any] = Future()
        try:
            answer = getattr(self._actor, method).remote(*arguments).future()
        except RayError as error:
            future.set_exception(_gone(error))
            return future

        def settle(answer: Future[Any]) -> None:
            error = answer.exception()
            if error is None:
                future.set_result(answer.result())
            elif isinstance(error, RayTaskError):
                future.set_exception(error.cause if isinstance(error.cause, Exception) else error)
            else:
                future.set_exception(_gone(error))

        answer.add_done_callback(settle)
        return future

    def kill(self) -> None:
        """End the actor's process."""
        with suppress(Exception):
            ray.kill(self._actor)


class RayCluster:
    """Slots as placement groups of their own, so that one can be given back, or replaced, alone."""

    def __init__(self, scaling: ScalingConfig, local: bool) -> None:
        self.scaling = scaling
        self.gpu = uses_gpu(scaling)
        self.bundle: dict[str, float] = {"CPU": scaling.cpus_per_worker, **({"GPU": 1.0} if self.gpu else {})}
        self._groups: dict[str, PlacementGroup] = {}
        self._nodes: dict[str, str] = {}
        self._placed = 0.0
        self._looked, self._alive = 0.0, {}
        self._look()
        if local and (room := self.room()) < scaling.min_workers:
            raise ClusterError(
                f"scaling.min_workers={scaling.min_workers}: the local Ray has room for {room} worker(s) of "
                f"{self.bundle}; lower scaling.min_workers or scaling.cpus_per_worker, or join a larger cluster with "
                "--address"
            )

    def reserve(self) -> str:
        """Ask for one more slot."""
        group = placement_group([self.bundle])
        slot = group.id.hex()
        self._groups[slot] = group
        return slot

    def node_of(self, slot: str) -> str | None:
        """Return the node of a slot, None while it is pending."""
        if slot not in self._nodes and time.monotonic() - self._placed > PLACED_S:
            # All groups in one request: there may be hundreds of them pending.
            for name, group in placement_group_table().items():
                if name in self._groups and group["state"] == "CREATED":
                    self._nodes[name] = group["bundles_to_node_id"][0]
            self._placed = time.monotonic()
        return self._nodes.get(slot)

    def release(self, slot: str) -> None:
        """Give a slot back."""
        self._nodes.pop(slot, None)
        with suppress(Exception):  # With the cluster gone there is nothing to give back.
            remove_placement_group(self._groups.pop(slot))

    def hand_back(self, slot: str, worker: Handle) -> None:
        """Give a slot back, and end the worker in it."""
        worker.kill()
        self.release(slot)

    def start_worker(self, slot: str) -> RayHandle:
        """Start a worker actor in a slot."""
        return self.start_in_slot(slot, Worker)

    def start_keeper(self, node: str, token: str, storage: StorageConfig) -> RayHandle:
        """Start a keeper actor on a node; it takes none of the resources that workers reserve."""
        self._look()
        host = self._alive.get(node, "127.0.0.1")
        return self.start_on_node(node, ray.remote(max_restarts=0, max_task_retries=0)(Keeper), host, token, storage)

    def hand_back_keeper(self, node: str, keeper: Handle) -> None:
        """End a keeper."""
        keeper.kill()

    def start_in_slot(self, slot: str, actor: Any) -> RayHandle:
        """Start an actor with all that a slot reserves; `actor` is a class that `ray.remote` has made."""
        options = actor.options(
            num_cpus=self.scaling.cpus_per_worker,
            num_gpus=1 if self.gpu else 0,
            max_concurrency=8,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=self._groups[slot]),
        )
        return RayHandle(options.remote())

    def start_on_node(self, node: str, actor: Any, *arguments: Any) -> RayHandle:
        """Start an actor on a node, without reserving anything."""
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        options = actor.options(num_cpus=0, max_concurrency=8, scheduling_strategy=strategy)
        return RayHandle(options.remote(*arguments))

    def share(self, value: Any) -> Any:
        """Put a value into Ray's object store; each node fetches it once, from whichever has it."""
        return ray.put(value)

    def alive(self, node: str) -> bool:
        """Tell whether Ray takes the node for alive."""
        self._look()
        return node in self._alive

    def draining(self) -> dict[str, float]:
        """Return the nodes that Ray drains, and the seconds that they have left."""
        with suppress(Exception):  # Not a public function of Ray; without it a drained node is a lost one.
            deadlines = global_state.get_draining_nodes()
            now = time.time() * 1000
            # A drain without a deadline is reported as 0.
            return {node: (at - now) / 1000 if at else 3600.0 for node, at in deadlines.items()}
        return {}

    def room(self) -> int:
        """Return how many workers the nodes could hold if they were empty."""
        return sum(self.room_of(node) for node in ray.nodes() if node["Alive"])

    def room_of(self, node: Mapping[str, Any]) -> int:
        """Return how many workers a node, as `ray.nodes` tells of it, could hold if it were empty."""
        return min(int(node["Resources"].get(kind, 0) / amount) for kind, amount in self.bundle.items())

    def _look(self) -> None:
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            self._alive = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}


def _gone(error: BaseException) -> Gone:
    """Return one line, and Ray's own error as its cause: that tells several, with identifiers and advice."""
    name = type(error).__name__.removeprefix("Ray").removesuffix("Error")
    if isinstance(error, RayActorError) and error.actor_init_failed:
        name = str(error).strip().splitlines()[-1]  # What its constructor raised comes last.
    texts = {
        "ActorDied": "its process died",
        "ActorUnavailable": "it cannot be reached",
        "OutOfMemory": "out of memory: Ray has killed its process, as its node had hardly any left",
    }
    gone = Gone(texts.get(name, name))
    gone.__cause__ = error
    return gone


def uses_gpu(scaling: ScalingConfig) -> bool:
    """Tell whether each worker reserves a GPU."""
    if scaling.accelerator == "auto":
        return ray.cluster_resources().get("GPU", 0) >= 1
    return scaling.accelerator == "gpu"


def _reach(address: str) -> None:
    """Find out within seconds whether anything listens there: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():  # `auto` and `local`: Ray looks for itself.
        return
    try:
        reach(host.strip("[]"), int(port))
    except (OSError, ValueError, OverflowError) as error:
        raise _no_answer(address, error) from error


def _no_answer(address: str, error: BaseException) -> ClusterError:
    return ClusterError(
        f"no Ray cluster answers at {address!r} ({error}); check --address or RAY_ADDRESS, "
        "or leave both out for a local Ray"
    )
