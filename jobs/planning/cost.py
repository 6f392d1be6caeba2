"""From work to seconds: a roofline on measured rates. Pure Python.

Each op costs its call, and then whichever takes longer: its operations at the rate of a product of that size, or its
bytes at the rate of memory for so many. A CPU pays call and work one after the other; a GPU is called ahead of what it
does, so the longer of the two counts (S. Williams et al., Roofline, 2009).
"""

from workers.calibrate import Calibration
from workers.work import Work, Works

PRODUCTS = ("matmul", "attention", "attention_backward")


def seconds_of(work: Work, calibration: Calibration) -> float:
    """Return the seconds of one op."""
    device = 0.0
    if work.kind in PRODUCTS:
        product = work.amount / calibration.curves[work.kind].rate(work.size)
        moved = work.nbytes / calibration.curves["elementwise"].rate(work.nbytes / work.parts)
        device = max(product, moved)
    elif work.amount:
        device = work.amount / calibration.curves[work.kind].rate(work.size)
    if calibration.kind == "cuda":
        return max(calibration.seconds_per_op, device)
    return calibration.seconds_per_op * work.parts + device


def seconds(works: Works, calibration: Calibration) -> float:
    """Return the seconds of them all, one after the other, where the process gets its share of the processor."""
    return sum(count * seconds_of(work, calibration) for work, count in works.items()) / calibration.share
