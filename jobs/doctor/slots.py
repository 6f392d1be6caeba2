"""The worker slots while they are measured: placed as a run's workers are, and given back at the end."""

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray

from jobs.doctor import checks
from jobs.doctor.findings import CLUSTER, Finding
from jobs.doctor.seen import LinkSeen, SlotSeen
from jobs.doctor.slot_probe import SlotProbe
from orchestrator.config import RunConfig
from orchestrator.group.cluster import RayCluster, RayHandle
from orchestrator.group.keeper import memory_of
from orchestrator.stop import StopSignal
from workers.member import Ready

PLACED_S = 10.0
"""How long to wait for slots on nodes that are up; a slot that is not given by then is taken by somebody else."""
LOOK_S = 0.1
"""How often whoever waits looks whether a person wants it to end."""
IMPORT_S = 180.0
MEASURE_S = 120.0
LOOK_THERE = "look at the device (nvidia-smi) and at Ray's logs there"
"""How to mend a slot that cannot be measured."""
LINK_S = 60.0
"""How long a process group may take to form and to be measured."""


def ask(calls: Mapping[str, Future[Any]], limit_s: float, stop: StopSignal) -> dict[str, Any]:
    """Wait for the answers; an exception, or a TimeoutError after `limit_s`, stands in the place of a missing one.

    Raises:
        Interrupted: a person has ended it.
    """
    deadline = time.monotonic() + limit_s
    while wait(calls.values(), LOOK_S).not_done and time.monotonic() < deadline:
        stop.check()
    stop.check()
    answers: dict[str, Any] = {}
    for name, call in calls.items():
        if not call.done():
            answers[name] = TimeoutError(f"no answer within {limit_s:g} s")
        else:
            answers[name] = call.exception() or call.result()
    return answers


def told(answer: Any) -> str:
    """Return one line for an error, or a text as it is; of Ray's long errors the line that names the cause."""
    if isinstance(answer, str):
        return answer
    lines = [line.strip() for line in str(answer.__cause__ or answer).splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith("Error")]
    return named[-1] if named else (lines or [type(answer).__name__])[0]


def ring_pairs(nodes: list[str]) -> list[list[tuple[str, str]]]:
    """Return rounds of pairs, in which each node meets its two neighbours on a ring, never two at the same time."""
    ring = [(nodes[i], nodes[(i + 1) % len(nodes)]) for i in range(len(nodes))]
    if len(nodes) % 2:
        return [ring[:-1:2], ring[1::2], ring[-1:]]
    return [ring[::2], ring[1::2]]


@dataclass(frozen=True)
class _Slot:
    name: str
    node: str
    probe: RayHandle
    host: str = ""


class Slots:
    """Placement groups with a probe in each.

    Args:
        cluster: where they are.
        config: of the run whose workers' place they take.
        names: of the nodes, by Ray's ids.
        stop: tells when a person wants it to end.
    """

    def __init__(self, cluster: RayCluster, config: RunConfig, names: Mapping[str, str], stop: StopSignal) -> None:
        self.cluster, self.config, self.names, self.stop = cluster, config, names, stop
        self.probes: list[_Slot] = []
        """Those that have imported all that training needs; grouped by node, as ranks are."""
        self.seen: list[SlotSeen] = []
        self.num_given = 0
        """Slots that the cluster gave in time."""
        self._reserved: list[str] = []
        self._handles: list[RayHandle] = []
        self._snapshot = 0

    def __enter__(self) -> "Slots":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.kill()
        for slot in self._reserved:
            self.cluster.release(slot)

    def start(self, number: int) -> list[Finding]:
        """Reserve slots and start a probe in each that the cluster gives; return what cannot start."""
        self._reserved = [self.cluster.reserve() for _ in range(number)]
        deadline, nodes = time.monotonic() + PLACED_S, {}
        while len(nodes) < number and time.monotonic() < deadline:
            self.stop.check()
            nodes = {slot: node for slot in self._reserved if (node := self.cluster.node_of(slot))}
            time.sleep(0.02)
        self.num_given = len(nodes)
        actor, started = ray.remote(max_restarts=0, max_task_retries=0)(SlotProbe), {}
        for slot, node in nodes.items():
            self._handles.append(handle := self.cluster.start_in_slot(slot, actor))
            started[slot] = _Slot(slot, self.names.get(node, node), handle)
        calls = {slot: one.probe.call("prepare", None) for slot, one in started.items()}
        found = []
        for slot, answer in ask(calls, IMPORT_S, self.stop).items():
            if isinstance(answer, Ready):
                self.probes.append(_Slot(slot, started[slot].node, started[slot].probe, answer.host))
            else:
                seen = f"a worker cannot start there: {told(answer)}"
                mend = "import torch and deepspeed by hand on that node; see Ray's logs"
                found.append(Finding("nodes", started[slot].node, "failure", seen, mend))
        self.probes.sort(key=lambda one: one.node)
        return found

    def measure(self) -> list[Finding]:
        """Measure all slots at the same time: devices, then the group of all, then pairs of nodes."""
        found, lost = [], []
        for one, answer in self._all("measure", MEASURE_S, lambda one: (one.node,)):
            if isinstance(answer, SlotSeen):
                self.seen.append(answer)
            else:
                lost.append(one)
                found.append(Finding("matrix products", one.node, "failure", told(answer), LOOK_THERE))
        self.probes = [one for one in self.probes if one not in lost]
        found += checks.check_rates(self.seen)
        if not self.probes:
            return found
        about = self.config.model, self.config.optim, len(self.probes)
        sized = ask({"": self.probes[0].probe.call("snapshot_bytes", *about)}, 60, self.stop)
        if isinstance(sized[""], int):
            self._snapshot = sized[""]
        else:
            seen = f"how large a snapshot is could not be found out: {told(sized[''])}"
            found.append(Finding("memory", CLUSTER, "failure", seen, LOOK_THERE))
        if len(self.probes) < 2:
            return found + checks.check_links(None, [])
        (group,) = self._link([self.probes])
        if not isinstance(group, LinkSeen):
            return [*found, _unlinked(self.probes, group)]
        first = {one.node: one for one in reversed(self.probes)}
        pairs, rounds = [], ring_pairs(sorted(first)) if len(first) > 2 else []
        for couples in rounds:
            members = [[first[a], first[b]] for a, b in couples]
            for couple, link in zip(members, self._link(members), strict=True):
                if isinstance(link, LinkSeen):
                    pairs.append(link)
                else:
                    found.append(_unlinked(couple, link))
        return found + checks.check_links(group, pairs)

    def calibrate(self) -> tuple[str, list[Finding]]:
        """Return a calibration file's text, of the slots that are like the first, and what could not be calibrated."""
        texts, found = [], []
        for one, answer in self._all("calibrate", MEASURE_S, lambda one: ()):
            if isinstance(answer, str):
                texts.append(answer)
            else:
                seen = f"it could not be calibrated: {told(answer)}"
                found.append(Finding("matrix products", one.node, "failure", seen, LOOK_THERE))
        if not texts:
            return "", found
        answer = ask({"": self.probes[0].probe.call("calibration_of", texts)}, MEASURE_S, self.stop)[""]
        if not isinstance(answer, str):
            seen = f"the calibrations could not be put together: {told(answer)}"
            found.append(Finding("matrix products", CLUSTER, "failure", seen, "look at Ray's logs"))
            return "", found
        return answer, found

    def on_nodes(self) -> Counter[str]:
        """Return how many slots each node has."""
        return Counter(one.node for one in self.probes)

    def memory_of_keepers(self) -> dict[str, tuple[int, int]]:
        """Return, by node, the bytes of snapshots that its keeper will hold, and those of copies on their way out.

        With more than one node it has those of another node's workers, too.
        """
        counts = self.on_nodes()
        most = max(counts.values(), default=0) if len(counts) > 1 else 0
        return {node: memory_of(number, most, self._snapshot) for node, number in counts.items()}

    def _all(self, method: str, limit_s: float, arguments: Any) -> list[tuple[_Slot, Any]]:
        calls = {one.name: one.probe.call(method, *arguments(one)) for one in self.probes}
        answers = ask(calls, limit_s, self.stop)
        return [(one, answers[one.name]) for one in self.probes]

    def _link(self, groups: list[list[_Slot]]) -> list[Any]:
        """Form disjoint process groups at the same time; return what rank 0 of each tells, or why there is none."""
        ports = ask(
            {str(i): group[0].probe.call("open_rendezvous", 0, len(group)) for i, group in enumerate(groups)},
            LINK_S,
            self.stop,
        )
        calls: dict[str, Future[Any]] = {}
        for i, group in enumerate(groups):
            members = tuple(one.node for one in group)
            for rank, one in enumerate(group):
                if isinstance(port := ports[str(i)], int):
                    calls[f"{i}/{rank}"] = one.probe.call("link", members, rank, group[0].host, port)
        answers = ask(calls, LINK_S, self.stop)
        told_by: list[Any] = []
        for i, group in enumerate(groups):
            own = [answers.get(f"{i}/{rank}", ports[str(i)]) for rank in range(len(group))]
            told_by.append(next((answer for answer in own if not isinstance(answer, LinkSeen)), own[0]))
        return told_by


def _unlinked(members: list[_Slot], answer: Any) -> Finding:
    nodes = ", ".join(dict.fromkeys(one.node for one in members))
    seen = f"{nodes}: no process group of {len(members)} slot(s): {told(answer)}"
    mend = (
        "open all TCP ports between the nodes (security group, network policy); on processors see that each node's own "
        "name means an address which the others reach, not 127.0.1.1, or set GLOO_SOCKET_IFNAME; on GPUs "
        "NCCL_DEBUG=INFO tells more"
    )
    return Finding("collectives", CLUSTER, "failure", seen, mend)
