"""From work to seconds: a roofline on measured rates. Pure Python.

Each op costs its call, and then whichever takes longer: its operations at the rate of a product of that size, or its
bytes at the rate of memory for so many (S. Williams et al., Roofline, 2009). A CPU pays call and work one after the
other. A GPU is called ahead of what it does: what takes longer counts, all calls or all work, where no kernel is
shorter than LEAST_KERNEL_S.
"""

from workers.calibrate import Calibration
from workers.work import Work, Works

PRODUCTS = ("matmul", "attention", "attention_backward")
LEAST_KERNEL_S = 2e-6
"""Of a GPU, assumed."""


def seconds_of(work: Work, calibration: Calibration) -> float:
    """Return the seconds of one op, on a GPU without its call."""
    device = 0.0
    if work.kind in PRODUCTS:
        product = work.amount / calibration.curves[work.kind].rate(work.size)
        moved = work.nbytes / calibration.curves["elementwise"].rate(work.nbytes / work.parts)
        device = max(product, moved)
    elif work.amount:
        device = work.amount / calibration.curves[work.kind].rate(work.size)
    if calibration.kind == "cuda":
        return max(LEAST_KERNEL_S, device) if work.amount else 0.0
    return calibration.seconds_per_op * work.parts + device


def seconds(works: Works, calibration: Calibration) -> float:
    """Return the seconds of them all, one after the other, where the process gets its share of the processor."""
    spent = sum(count * seconds_of(work, calibration) for work, count in works.items())
    if calibration.kind == "cuda":
        spent = max(spent, calibration.seconds_per_op * sum(works.values()))
    return spent / calibration.share
