"""Ray itself: join a cluster or start a local one, and reserve a slot for each worker."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from orchestrator.config import ScalingConfig
from orchestrator.reach import reach
from workers.errors import ClusterError, Interrupted

GRACE_S = 5.0
"""How long to wait for more workers than the minimum, once the minimum is there."""


@contextmanager
def connected(address: str | None) -> Iterator[bool]:
    """Join the cluster at `address` (or RAY_ADDRESS), or start a local Ray; yield whether it is local.

    Raises:
        ClusterError: no cluster answers there.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    _reach(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own in its place.
    try:
        # "local" keeps Ray from joining whatever cluster happens to run on this machine.
        ray.init(
            address,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            # Ray starts workers at niceness 15, behind everything else on the machine; training is what it is for.
            _system_config={"worker_niceness": 0} if local else None,
        )
        signal.signal(signal.SIGTERM, on_sigterm)
    except SystemExit as error:  # What Ray's own handler makes of a SIGTERM.
        raise Interrupted("interrupted; nothing had begun") from error
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if local:
            raise ClusterError(f"a local Ray could not be started: {error}") from error
        raise _no_answer(address, error) from error
    try:
        yield local
    finally:
        ray.shutdown()


@contextmanager
def reserved_slots(
    scaling: ScalingConfig, local: bool, notice: Callable[[str], None], check: Callable[[], None]
) -> Iterator[list[PlacementGroup]]:
    """Reserve between min_workers and max_workers slots, one placement group each, and free them at the end.

    A placement group cannot be resized, so each slot is one of its own: a slot can be given back alone, and a pending
    one is the demand that an autoscaler sees. `notice` takes a line for the person who waits; `check` is called while
    waiting and may raise.

    Raises:
        ClusterError: the cluster cannot hold min_workers, or did not within `wait_s`.
    """
    bundle = _bundle(scaling)
    if local and (room := _room(bundle)) < scaling.min_workers:
        raise ClusterError(
            f"scaling.min_workers={scaling.min_workers}: the local Ray has room for {room} worker(s) of {bundle}; "
            "lower scaling.min_workers or scaling.cpus_per_worker, or join a larger cluster with --address"
        )
    groups = [placement_group([bundle]) for _ in range(scaling.max_workers)]
    try:
        yield _wait(groups, bundle, scaling, notice, check)
    finally:
        for group in groups:
            remove_placement_group(group)


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


def _bundle(scaling: ScalingConfig) -> dict[str, float]:
    return {"CPU": scaling.cpus_per_worker, **({"GPU": 1.0} if uses_gpu(scaling) else {})}


def _room(bundle: dict[str, float]) -> int:
    """Return how many bundles the nodes can hold when they are empty."""
    return sum(
        min(int(node["Resources"].get(kind, 0) / amount) for kind, amount in bundle.items())
        for node in ray.nodes()
        if node["Alive"]
    )


def _wait(
    groups: list[PlacementGroup],
    bundle: dict[str, float],
    scaling: ScalingConfig,
    notice: Callable[[str], None],
    check: Callable[[], None],
) -> list[PlacementGroup]:
    """Wait for all slots, or for the minimum and a short grace; give back what is still pending."""
    waiting = {group.ready(): group for group in groups}
    deadline, grace_ends, noticed = time.monotonic() + scaling.wait_s, None, False
    while waiting:
        check()
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=0.5)
        for reference in done:
            del waiting[reference]
        now, ready = time.monotonic(), len(groups) - len(waiting)
        if ready >= scaling.min_workers and grace_ends is None:
            grace_ends = now + GRACE_S
        if grace_ends is not None and now >= grace_ends:
            break
        if now >= deadline:
            raise ClusterError(
                f"scaling.min_workers={scaling.min_workers}: after {scaling.wait_s:g} s the cluster has given "
                f"{ready} slot(s) of {bundle}; the nodes that are up have room for {_room(bundle)}. Lower "
                "scaling.min_workers, add nodes, or raise scaling.wait_s"
            )
        if not noticed and ready < scaling.min_workers and now > deadline - scaling.wait_s + 2:
            notice(f"waiting for {scaling.min_workers} worker slots of {bundle}; the cluster has given {ready}")
            noticed = True
    pending = set(waiting.values())
    for group in pending:
        remove_placement_group(group)
    return [group for group in groups if group not in pending]
