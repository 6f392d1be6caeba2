"""How a replay is judged."""

from jobs.load import load
from jobs.record import OTHER_PRECISION, TOLERANCE, Record
from jobs.replay import Request, tolerance_for

GPU, CPU = (Record(devices={1: (device,)}) for device in ("NVIDIA H100", "cpu"))


def test_the_tolerance_goes_by_the_devices_of_the_workers_on_both_sides():
    auto, request = load("demo", []), Request("run")
    assert tolerance_for(request, auto, GPU, GPU, 1) == TOLERANCE
    assert tolerance_for(request, auto, GPU, CPU, 1) == OTHER_PRECISION
    assert tolerance_for(request, load("demo", ["train.precision=fp32"]), GPU, CPU, 1) == TOLERANCE


def test_no_tolerance_at_all_can_be_asked_for():
    assert tolerance_for(Request("run", tolerance=0.0), load("demo", []), GPU, CPU, 1) == 0.0
