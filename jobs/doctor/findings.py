"""What a check says, how like findings of several nodes become one line, and the exit code that follows. Pure."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from workers.common.errors import ClusterError, StorageError

Check = Literal[
    "nodes",
    "versions",
    "memory",
    "clock",
    "dashboard",
    "token",
    "matrix products",
    "collectives",
    "storage",
    "data",
    "tracking",
]
STORAGE_CHECKS = ("storage", "data", "tracking")
"""Their failures end with StorageError's exit code, all others with ClusterError's."""
CLUSTER = "cluster"
"""In the place of a node's name: it is about all of them."""
SLOW = 0.7
"""Below this share of the median a device or a link is a straggler; a step waits for its slowest member."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    check: Check
    node: str
    """A node's name, several with commas between them, `driver`, or CLUSTER."""
    status: Literal["ok", "warning", "failure"]
    seen: str
    """What was observed, with values and units."""
    mend: str = ""
    """What a person can do; empty where nothing has to be done."""


def merged(findings: Iterable[Finding], nodes: int) -> list[Finding]:
    """Make one of findings that differ only in the node; on all of at least two `nodes` it becomes CLUSTER."""
    names: dict[Finding, list[str]] = {}
    for finding in findings:
        names.setdefault(replace(finding, node=""), []).append(finding.node)

    def name(among: list[str]) -> str:
        one_each = list(dict.fromkeys(among))
        everywhere = nodes > 1 and len([node for node in one_each if node not in (CLUSTER, "driver")]) == nodes
        return CLUSTER if everywhere else ", ".join(one_each)

    return [replace(finding, node=name(among)) for finding, among in names.items()]


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 where nothing failed, the cluster's code where it did, the storage's where only that or tracking did."""
    failed = {finding.check in STORAGE_CHECKS for finding in findings if finding.status == "failure"}
    if not failed:
        return 0
    return ClusterError.exit_code if False in failed else StorageError.exit_code


def stragglers(rates: Mapping[str, float]) -> dict[str, float]:
    """Return whoever is slower than SLOW of the median, with the share of it that it has."""
    if not rates:
        return {}
    median = statistics.median(rates.values())
    return {name: rate / median for name, rate in rates.items() if rate < SLOW * median}


def size(number: float) -> str:
    """Write bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
