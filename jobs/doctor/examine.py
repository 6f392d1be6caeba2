"""The doctor's round: join the cluster, send the probes out, have what they saw judged, and leave nothing behind.

Waiting is done in short stretches, so that Ctrl-C ends it; probes that are at work in a store are given a moment to
finish then, and whatever is left of their folder is removed.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray

from jobs.doctor import checks, places
from jobs.doctor.findings import Check, Finding, merged
from jobs.doctor.node_probe import NodeProbe
from jobs.doctor.seen import ClockSeen, Machine, NodeSeen, PlaceSeen, TrackingSeen
from jobs.doctor.slots import Slots, ask, told
from jobs.doctor.tracking_probe import look_at_tracking
from orchestrator.config import RunConfig
from orchestrator.group.access import Access
from orchestrator.group.cluster import RayCluster, RayHandle, connected
from orchestrator.preflight import in_background
from orchestrator.stop import StopSignal
from workers.common.errors import ConfigError

ANSWER_S = 60.0
"""How long a node may take to start a process and answer."""
PLACE_S = 180.0
"""How long a node may take with a store, or the driver with tracking; a client tries a dead store several times."""
CLOCK_TRIES = 8
"""The exchange with the shortest round trip counts."""
LINGER_S = 10.0
"""How long a probe that is interrupted may go on, to finish what it does in a store."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What is looked at, besides the cluster itself."""

    storage: bool
    """checkpoint.url."""
    data: bool
    """data.prepared_url."""
    tracking: bool
    all_slots: bool
    """Measure every slot, not only as many as the run may have workers."""
    calibrate: bool
    """Measure devices and collectives for `raymuon plan`, too."""


@dataclass(frozen=True)
class Examined:
    """What came out of it."""

    findings: list[Finding]
    calibration: str = ""
    """Text of a calibration file, where one was asked for and a slot could be measured."""


def examine(
    config: RunConfig, scope: Scope, address: str | None, stop: StopSignal, phase: Callable[[str], None]
) -> Examined:
    """Look at a cluster and, as `scope` says, at the places that a run needs.

    Args:
        config: of the run, with absolute paths.
        scope: what is looked at.
        address: of a Ray cluster; None starts a local one, unless RAY_ADDRESS is set.
        stop: tells when a person wants it to end.
        phase: told what is being done.

    Raises:
        ClusterError: no cluster answers.
        Interrupted: a person has ended it.
    """
    looking = None
    if scope.tracking:  # A run in MLflow must not be left half made: the thread is waited for.
        looking = in_background(lambda: look_at_tracking(config.tracking), may_be_torn=False)
    phase("joining the cluster")
    with connected(address, stop) as joined, _Round(config, stop) as round_:
        phase(f"looking at {len(round_.machines)} node(s)")
        found = round_.look(joined.dashboard_url)
        if scope.storage:
            phase(f"using {config.checkpoint.url} from {len(round_.machines)} node(s)")
            found += round_.storage()
        if scope.data:
            found += round_.data()
        wanted = round_.room if scope.all_slots else min(round_.room, config.scaling.max_workers)
        with Slots(round_.cluster, config, round_.names, stop) as slots:
            phase(f"starting {wanted} worker slot(s)")
            found += slots.start(wanted)
            phase(f"measuring {len(slots.probes)} slot(s)")
            found += slots.measure()
            found += round_.judge(slots, wanted)
            calibration = ""
            if scope.calibrate:
                phase("calibrating: some ten seconds")
                calibration, failed = slots.calibrate()
                found += failed
        if looking is not None:
            phase(f"using {config.tracking.uri}")
            answer = ask({"": looking}, PLACE_S, stop)[""]
            if not isinstance(answer, TrackingSeen):
                answer = TrackingSeen(uri=config.tracking.uri, error=told(answer), doing="using it")
            found += places.check_tracking(answer)
        order = {check: number for number, check in enumerate(Check.__args__)}  # type: ignore[attr-defined]
        return Examined(sorted(merged(found, len(round_.machines)), key=lambda one: order[one.check]), calibration)


class _Round:
    """The nodes' probes, and what they have seen so far."""

    def __init__(self, config: RunConfig, stop: StopSignal) -> None:
        self.config, self.stop = config, stop
        self.cluster = RayCluster(config.scaling, local=False)
        self.driver = NodeProbe(config.storage.s3_endpoint)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self.names = _names(nodes)
        self.machines = {
            self.names[node["NodeID"]]: Machine(
                node=self.names[node["NodeID"]],
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=node["Resources"].get("GPU", 0.0),
                slots=self.cluster.room_of(node),
                object_store=int(node["Resources"].get("object_store_memory", 0)),
            )
            for node in nodes
        }
        self.room = sum(machine.slots for machine in self.machines.values())
        self.head = next((self.names[n["NodeID"]] for n in nodes if "node:__internal_head__" in n["Resources"]), "")
        self.seen: dict[str, NodeSeen] = {}
        self.probes: dict[str, RayHandle] = {}
        self._mark = f".raymuon-doctor-{secrets.token_hex(6)}"
        self._urls: list[str] = []
        self._calls: list[Future[Any]] = []

    def __enter__(self) -> "_Round":
        actor = ray.remote(max_restarts=0, max_task_retries=0)(NodeProbe)
        for node, name in self.names.items():
            self.probes[name] = self.cluster.start_on_node(node, actor, self.config.storage.s3_endpoint)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._urls:
            wait_for(self._calls, LINGER_S)
            tidying = [probe.call("tidy", self._urls, self._mark) for probe in self.probes.values()]
            wait_for(tidying, LINGER_S)
        for probe in self.probes.values():
            probe.kill()
        if self._urls:
            wait_for(self._calls, LINGER_S)  # Whoever was still writing is dead then.
            self.driver.tidy(self._urls, self._mark)

    def look(self, dashboard_url: str) -> list[Finding]:
        """Look at every node; whoever does not answer is asked for nothing more."""
        found, answers = [], self._ask(ANSWER_S, "look")
        for name, answer in answers.items():
            if isinstance(answer, NodeSeen):
                self.seen[name] = answer
                continue
            self.probes.pop(name).kill()
            mend = "install raymuon and its libraries there, or let the job bring them (working_dir); see Ray's logs"
            found.append(Finding("nodes", name, "failure", f"no process of ours runs there: {told(answer)}", mend))
        for name in self.probes:
            found += self._clock(name)
        return found + self._dashboard(dashboard_url)

    def _dashboard(self, url: str) -> list[Finding]:
        """Have the head, which always reaches it, look at its dashboard; one that died is still announced."""
        access, dead, unknown = None, "", ""
        if url and self.head not in self.probes:
            return checks.check_token(None, "", self.seen)
        if url:
            (answer,) = ask({"": self.probes[self.head].call("access", url)}, ANSWER_S, self.stop).values()
            if isinstance(answer, Access):
                access = answer
            elif isinstance(answer, ConfigError):  # The head's own token cannot be read.
                unknown = told(answer)
            else:
                dead = told(answer).partition("; ")[0]
        return checks.check_dashboard(url, dead) + checks.check_token(access, unknown, self.seen)

    def storage(self) -> list[Finding]:
        """Use the folder for checkpoints from everywhere at the same time, then see whether it is one folder."""
        url = self._begin(self.config.checkpoint.url)
        used = self._ask(PLACE_S, "use", url, self._mark, on_driver=True)
        seen = {
            name: place if isinstance(place, PlaceSeen) else PlaceSeen(error=f"{url}: {told(place)}")
            for name, place in used.items()
        }
        found = places.check_place(url, seen)
        written = [name for name, place in seen.items() if not place.error]
        return found + self._shared("storage", url, written, written)

    def data(self) -> list[Finding]:
        """See whether what the driver prepares can be read everywhere."""
        url = self._begin(self.config.data.prepared_url)
        if error := ask({"": self._on_driver("mark", url, self._mark, "driver")}, PLACE_S, self.stop)[""]:
            return [Finding("data", "driver", "failure", told(error), places.mend_place(told(error)))]
        return self._shared("data", url, ["driver"], list(self.probes))

    def judge(self, slots: Slots, wanted: int) -> list[Finding]:
        """Judge what is known of the nodes as a whole, now that the slots have told where workers would be."""
        scaling, counts = self.config.scaling, slots.on_nodes()
        found = checks.check_nodes(list(self.machines.values()), scaling, self.cluster.gpu, wanted, slots.num_given)
        found += checks.check_likeness({name: self.seen[name] for name in counts if name in self.seen})
        found += checks.check_versions(self.seen, self.driver.look(), slots.seen)
        needs = slots.memory_of_keepers()
        tried = ask(
            {name: self.probes[name].call("try_memory", needs.get(name, (0, 0))[0]) for name in self.probes},
            ANSWER_S,
            self.stop,
        )
        for name, error in tried.items():
            snapshots, saving = needs.get(name, (0, 0))
            found += checks.check_memory(self.machines[name], self.seen[name], snapshots, saving, told(error))
        return found

    def _begin(self, url: str) -> str:
        """Have the place tidied up at the end; the driver, who is the last to do so, looks first at what is there."""
        self.driver.note_parents(url)
        self._urls.append(url)
        return url

    def _shared(self, check: Check, url: str, written: list[str], readers: list[str]) -> list[Finding]:
        calls = {name: self.probes[name].call("marks", url, self._mark) for name in readers if name in self.probes}
        if "driver" in readers:
            calls["driver"] = self._on_driver("marks", url, self._mark)
        seen = {
            name: marks if isinstance(marks, list) else told(marks)
            for name, marks in self._await(calls, PLACE_S).items()
        }
        return places.check_shared(check, url, written, seen)

    def _clock(self, name: str) -> list[Finding]:
        """Compare a node's clock with ours, as NTP does: half of the round trip is taken for the way there."""
        tries = []
        for _ in range(CLOCK_TRIES):
            asked = time.time()
            (answer,) = ask({"": self.probes[name].call("clock")}, ANSWER_S, self.stop).values()
            heard = time.time()
            if not isinstance(answer, float):
                return [
                    Finding("nodes", name, "failure", f"it answers no more: {told(answer)}", "see Ray's logs there")
                ]
            tries.append((heard - asked, answer - (asked + heard) / 2))
        round_trip, offset = min(tries)
        return checks.check_clock(name, ClockSeen(offset_s=offset, round_trip_s=round_trip))

    def _ask(self, limit_s: float, method: str, *arguments: Any, on_driver: bool = False) -> dict[str, Any]:
        """Call a method of all probes at the same time; `use` gets the name of whom it leaves a mark for."""
        named = method == "use"
        calls = {
            name: probe.call(method, *arguments, *([name] if named else [])) for name, probe in self.probes.items()
        }
        if on_driver:
            calls["driver"] = self._on_driver(method, *arguments, "driver")
        return self._await(calls, limit_s)

    def _on_driver(self, method: str, *arguments: Any) -> Future[Any]:
        return in_background(lambda: getattr(self.driver, method)(*arguments), may_be_torn=True)

    def _await(self, calls: Mapping[str, Future[Any]], limit_s: float) -> dict[str, Any]:
        self._calls = list(calls.values())
        return ask(calls, limit_s, self.stop)


def _names(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Return a name for people for every node's id: its address, and a part of the id where several share that."""
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return {
        node["NodeID"]: address if addresses.count(address) == 1 else f"{address}-{node['NodeID'][:6]}"
        for node, address in zip(nodes, addresses, strict=True)
    }
