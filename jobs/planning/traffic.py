"""What a rank sends in a step, by collective: the formulas behind what `workers/traffic.py` counts.

Ring algorithms: a rank sends (n - 1) / n of the payload, in an all-reduce twice that; all-to-all is exact.
"""

from jobs.planning.state import Layout
from workers.boundary import num_bytes


def traffic_of(layout: Layout, itemsize: int, wire: int) -> dict[str, float]:
    """Return the bytes that the mean rank sends for DeepSpeed's step, by collective, as a run's `traffic/*`.

    Args:
        layout: of the parameters.
        itemsize: bytes of a weight or gradient.
        wire: bytes of an element of a straddling matrix.
    """
    ranks = layout.groups[0].layout.world_size
    if ranks == 1:
        return {}
    gathered = sum(itemsize * group.layout.partition * ranks * (ranks - 1) // ranks for group in layout.groups)
    sent = {
        "reduce": itemsize * layout.parameters * (ranks - 1) / ranks,
        "all_gather": float(gathered),
        # The gradient's norm, a number in fp32 for each group, and in bf16 a byte that tells whether it is finite.
        "all_reduce": float(len(layout.groups) * (2 * 4 * (ranks - 1) // ranks)),
    }
    if itemsize == 2:
        sent["all_reduce"] += 2 * (ranks - 1) // ranks
    if layout.plan is not None:  # The squares of all gradients, and of each straddler's, in fp64.
        sent["all_reduce"] += 2 * 8 * (1 + len(layout.plan.straddlers)) * (ranks - 1) // ranks
    if layout.plan is not None and layout.plan.straddlers:
        sent["all_to_all"] = wire * sum(layout.plan.elements_sent()) / ranks
    return sent


def boundary_bytes(layout: Layout) -> float:
    """Return what a rank sends for the all-reduce at the end of a step."""
    ranks = layout.groups[0].layout.world_size
    return 2 * num_bytes(layout.expert_loads) * (ranks - 1) / ranks
