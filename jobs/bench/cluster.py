"""A Ray cluster of several nodes in this machine, of which nodes can be taken."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


class BenchCluster:
    """A Ray cluster of several nodes in this machine, each with room for `cpus` workers; the head has none."""

    def __init__(self, nodes: int, cpus: int = 1) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address, self.cpus = self.cluster.address, cpus
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> None:
        """Add a node."""
        self.cluster.add_node(num_cpus=self.cpus)

    def kill_node(self, node_id: str) -> float:
        """SIGKILL everything on a node at once, and return when that was."""
        node = self._node(node_id)
        (raylet,) = node.all_processes["raylet"]
        victims = [psutil.Process(raylet.process.pid)]
        victims += victims[0].children(recursive=True)
        at = time.time()
        for process in victims:
            process.kill()
        self.cluster.worker_nodes.remove(node)
        return at

    def drain_node(self, node_id: str) -> float:
        """Announce that a node will go away in 30 s, and return when that was."""
        at = time.time()
        ray = Path(sys.executable).with_name("ray")
        command = [str(ray), "drain-node", "--address", self.address, "--node-id", node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "bench"]
        subprocess.run([*command, "--deadline-remaining-seconds", "30"], check=True, capture_output=True)
        return at

    def shutdown(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()

    def _node(self, node_id: str) -> Any:
        return next(node for node in self.cluster.worker_nodes if node.node_id == node_id)


@contextmanager
def bench_cluster(nodes: int, cpus: int = 1) -> Iterator[BenchCluster]:
    """Run a cluster for as long as the block lasts."""
    cluster = BenchCluster(nodes, cpus)
    try:
        yield cluster
    finally:
        cluster.shutdown()
