"""What is judged of nodes, slots and Ray itself. Pure: `observation -> findings`."""

import statistics
from collections.abc import Mapping, Sequence

from jobs.doctor.findings import CLUSTER, Finding, size, stragglers
from jobs.doctor.seen import ClockSeen, LinkSeen, Machine, NodeSeen, SlotSeen
from orchestrator.config import ScalingConfig
from orchestrator.group.access import Access

SKEW_WARNING_S = 1.0
"""The record's times come from the nodes, and a lease lasts for seconds."""
SKEW_FAILURE_S = 5.0
MIN_FILES = 8192
"""Open files of a process: Ray holds sockets to all its peers, gloo to every rank for each group."""
MEMORY_ALIKE = 0.05
"""Share by which the memory of like machines may differ."""


def check_nodes(
    machines: Sequence[Machine], scaling: ScalingConfig, gpu: bool, asked: int, given: int
) -> list[Finding]:
    """Judge whether the nodes that are up can hold the run's workers.

    Args:
        machines: all that are alive.
        scaling: how many workers the run wants.
        gpu: whether each reserves one.
        asked: slots that the cluster was asked for, no more than it has.
        given: of these, how many it gave within seconds.
    """
    room, worker = sum(machine.slots for machine in machines), f"{scaling.cpus_per_worker:g} CPU"
    worker += " and 1 GPU" if gpu else ""
    nodes = [f"{m.node}: {m.cpus:g} CPU, {m.gpus:g} GPU, {m.slots} slot(s)" for m in machines]
    found = [Finding("nodes", CLUSTER, "ok", f"{len(machines)} node(s) alive; " + "; ".join(nodes))]
    wanted = f"scaling.min_workers={scaling.min_workers}, scaling.max_workers={scaling.max_workers}"
    seen = f"room for {room} worker(s) of {worker}; {wanted}"
    if room < scaling.min_workers:
        mend = "add nodes, or lower scaling.min_workers or scaling.cpus_per_worker"
        found.append(Finding("nodes", CLUSTER, "failure", seen, mend))
    elif room < scaling.max_workers + scaling.standby:
        found.append(Finding("nodes", CLUSTER, "warning", seen, "the run will train with fewer until nodes come"))
    else:
        found.append(Finding("nodes", CLUSTER, "ok", seen))
    if given < asked:
        mend = "end what takes the others, or wait for it; only free slots were measured"
        found.append(Finding("nodes", CLUSTER, "warning", f"{given} of {asked} slot(s) are free", mend))
    return found


def check_likeness(nodes: Mapping[str, NodeSeen]) -> list[Finding]:
    """Judge whether the nodes that hold workers are alike: every step waits for the weakest."""
    kinds: dict[str, list[str]] = {}
    for name, seen in nodes.items():
        like = next(
            (
                others[0]
                for others in kinds.values()
                if (nodes[others[0]].cpus, nodes[others[0]].gpus) == (seen.cpus, seen.gpus)
                and abs(nodes[others[0]].memory - seen.memory) <= MEMORY_ALIKE * seen.memory
            ),
            name,
        )
        kinds.setdefault(like, []).append(name)
    if len(kinds) < 2:
        return []
    told = [f"{', '.join(names)}: {_hardware(nodes[names[0]])}" for names in kinds.values()]
    mend = "a step takes as long as the slowest worker's; use one kind of machine for workers"
    return [Finding("nodes", CLUSTER, "warning", "machines differ; " + "; ".join(told), mend)]


def _hardware(seen: NodeSeen) -> str:
    gpus = f", {len(seen.gpus)} x {seen.gpus[0]}" if seen.gpus else ""
    return f"{seen.cpus} CPU, {size(seen.memory)}{gpus}"


def check_versions(nodes: Mapping[str, NodeSeen], driver: NodeSeen, slots: Sequence[SlotSeen]) -> list[Finding]:
    """Compare every node's software with the driver's, and what torch was built with among the slots.

    A build (`+cu128`) may differ between a driver without a GPU and the nodes that have one; a release may not.
    """
    found = []
    for name, seen in nodes.items():
        for what in sorted(driver.versions.keys() | seen.versions.keys()):
            here, there = driver.versions.get(what, "none"), seen.versions.get(what, "none")
            if here.partition("+")[0] != there.partition("+")[0]:
                told = f"{what} {there}; the driver has {here}"
                mend = "start all nodes and the driver from one image, or from one lock file and one commit"
                found.append(Finding("versions", name, "failure", told, mend))
    for what in ("CUDA", "NCCL"):
        found += _one_of(what, {slot.node: slot.libraries[what] for slot in slots if what in slot.libraries})
    found += _one_of("NVIDIA driver", {name: seen.driver for name, seen in nodes.items() if seen.driver})
    if not found:
        told = ", ".join(f"{what} {version}" for what, version in driver.versions.items())
        found.append(Finding("versions", CLUSTER, "ok", told + "; alike on the driver and all nodes"))
    return found


def _one_of(what: str, versions: Mapping[str, str]) -> list[Finding]:
    if len(set(versions.values())) < 2:
        return []
    common = statistics.mode(versions.values())
    holder = next(name for name, version in versions.items() if version == common)
    mend = "use one image on all GPU nodes; NCCL and kernels behave by their versions"
    return [
        Finding("versions", name, "failure", f"{what} {version}; {holder} has {common}", mend)
        for name, version in versions.items()
        if version != common
    ]


def check_memory(
    machine: Machine, seen: NodeSeen, snapshots: int, saving: int, memory_error: str = ""
) -> list[Finding]:
    """Judge a node's memory, shared memory and open files.

    Args:
        machine: as Ray sees it.
        seen: as a process there sees it.
        snapshots: bytes that keepers hold there when every slot has a worker: own snapshots and the buddy's copies.
        saving: bytes on top of them while checkpoints are on their way to storage.
        memory_error: why an anonymous file of the snapshots' size could not be made.
    """
    found, node = [], machine.node
    told = f"{size(seen.available)} of {size(seen.memory)} are available"
    if snapshots:
        told = f"snapshots take {size(snapshots)}, and {size(saving)} more while they are saved; {told}"
    more = "use more nodes or machines with more memory; a container's limit counts, too"
    if memory_error:
        told, mend = f"memfd_create of {size(snapshots)}: {memory_error}", "raise `ulimit -f` or the container's limits"
        found.append(Finding("memory", node, "failure", told, mend))
    elif seen.available < snapshots:
        found.append(Finding("memory", node, "failure", told, more))
    elif seen.available < snapshots + saving:
        found.append(Finding("memory", node, "warning", told, more))
    else:
        found.append(Finding("memory", node, "ok", told))
    told = f"/dev/shm has {size(seen.shm)}, Ray's object store is of {size(machine.object_store)}"
    if seen.shm < machine.object_store:
        mend = "Ray goes to /tmp then, which is slow; start the container with a larger --shm-size"
        found.append(Finding("memory", node, "warning", told, mend))
    else:
        found.append(Finding("memory", node, "ok", told))
    if seen.max_files < MIN_FILES:
        told, mend = f"a process may open {seen.max_files:,} files", f"ulimit -n {8 * MIN_FILES} before `ray start`"
        found.append(Finding("memory", node, "warning", told, mend))
    return found


def check_clock(node: str, seen: ClockSeen, other: str = "the driver") -> list[Finding]:
    """Judge a node's clock."""
    told = f"{seen.offset_s:+.3f} s against {other}'s (within {seen.round_trip_s / 2:.3f} s)"
    mend = "let the node set its clock by NTP (chrony); the record's times and S3's signatures rest on it"
    if abs(seen.offset_s) > SKEW_FAILURE_S:
        return [Finding("clock", node, "failure", told, mend)]
    if abs(seen.offset_s) > SKEW_WARNING_S:
        return [Finding("clock", node, "warning", told, mend)]
    return [Finding("clock", node, "ok", "within 1 s of the driver's" if other == "the driver" else told)]


def check_dashboard(url: str, no_answer: str) -> list[Finding]:
    """Judge whether the head takes jobs; what is wrong with a dashboard that answers is told by `check_token`.

    Args:
        url: of the dashboard, as the head announces it, be it alive or dead; empty where nobody tells of one.
        no_answer: what came in the place of an answer; empty where one came.
    """
    if not url:
        seen = "the cluster tells of none; raymuon submit needs one, raymuon train does not"
        return [Finding("dashboard", CLUSTER, "ok", seen)]
    if not no_answer:
        return [Finding("dashboard", CLUSTER, "ok", f"it answers at {url}: jobs are taken")]
    seen = f"{no_answer}: no job is taken (raymuon submit), none is told of or stopped; what trains goes on"
    mend = "read dashboard.log in the head's /tmp/ray/session_latest/logs; Ray does not start it again: restart the "
    mend += "head when what runs there has ended; raymuon train --address works without"
    return [Finding("dashboard", CLUSTER, "failure", seen, mend)]


def check_token(access: Access | None, no_access: str, nodes: Mapping[str, NodeSeen]) -> list[Finding]:
    """Judge who may give this cluster commands.

    Args:
        access: of the dashboard, as the head reaches it; None where it is not known.
        no_access: why it is not, where there is a dashboard that lives.
        nodes: the modes of Ray's processes and the tokens' files.
    """
    found = []
    mend = "stop Ray, run `(umask 077; ray get-auth-token --generate)` on the head, copy ~/.ray/auth_token to all "
    mend += "nodes and start them with RAY_AUTH_MODE=token"
    if no_access:
        found.append(Finding("token", CLUSTER, "warning", no_access, "look into dashboard.log on the head"))
    if access is not None:
        reach = "over loopback alone" if access.loopback else "from other machines"
        told = f"the dashboard at {access.url} is reached {reach} and asks for "
        told += "a token" if access.asks_for_token else "no token"
        if access.exposed:
            found.append(Finding("token", CLUSTER, "failure", told + ": anybody runs code on all nodes", mend))
        elif access.accepts_ours is False:
            found.append(Finding("token", CLUSTER, "failure", told + ", and not the head's own", mend))
        elif not access.asks_for_token:
            found.append(Finding("token", CLUSTER, "warning", told + ": every user of the head runs code on it", mend))
        else:
            found.append(Finding("token", CLUSTER, "ok", told))
    for name, seen in nodes.items():
        if seen.token_mode != "token":
            told = "Ray's ports ask for no token: who reaches them runs code here"
            found.append(Finding("token", name, "warning", told, mend + "; or close the ports to others"))
        if seen.token_file:
            told = f"others may read {seen.token_file}, the token's file"
            found.append(Finding("token", name, "warning", told, f"chmod 600 {seen.token_file}"))
    if not found:
        found.append(Finding("token", CLUSTER, "ok", "Ray's ports ask for a token"))
    return found


def check_rates(slots: Sequence[SlotSeen]) -> list[Finding]:
    """Judge the slots' speed at matrix products; a step waits for the slowest."""
    if not slots:
        return []
    rates = {f"{slot.node} (slot {number})": slot.tflops for number, slot in enumerate(slots)}
    median = statistics.median(rates.values())
    told = f"{len(slots)} slot(s) of {slots[0].device}: {min(rates.values()):.3g} to {max(rates.values()):.3g}, "
    found = [Finding("matrix products", CLUSTER, "ok", told + f"median {median:.3g} TFLOP/s, all at the same time")]
    for name, share in stragglers(rates).items():
        told = f"{rates[name]:.3g} TFLOP/s, {share:.2f} of the median"
        mend = "look for other work, heat or a power limit on it (nvidia-smi -q -d PERFORMANCE); replace the node"
        found.append(Finding("matrix products", name, "warning", told, mend))
    return found


def check_links(group: LinkSeen | None, pairs: Sequence[LinkSeen]) -> list[Finding]:
    """Judge the collectives: of all slots together, and of pairs of nodes, where there are at least three nodes."""
    if group is None:
        return [Finding("collectives", CLUSTER, "ok", "one slot: nothing to send")]
    told = f"all-reduce over {len(group.members)} slot(s) with {group.backend}: "
    told += f"{group.latency_s * 1e6:,.0f} us, {size(group.bytes_per_s)}/s from each rank"
    found = [Finding("collectives", CLUSTER, "ok", told)]
    best: dict[str, float] = {}  # A node is as fast as its best link: with the worst a slow peer would count, too.
    for pair in pairs:
        for node in pair.members:
            best[node] = max(best.get(node, 0.0), pair.bytes_per_s)
    for node, share in stragglers(best).items():
        told = f"{size(best[node])}/s to its best neighbour, {share:.2f} of the median"
        mend = "look at its network interface, its placement (one zone, one rack) and NCCL_DEBUG=INFO"
        found.append(Finding("collectives", node, "warning", told, mend))
    return found
