"""How a replay is judged."""

from jobs.replay import precision_of


def test_the_precision_goes_by_the_config_and_the_devices_of_the_workers():
    assert precision_of("auto", ("NVIDIA H100",)) == "bf16" == precision_of("bf16", ("cpu",))
    assert precision_of("auto", ("cpu",)) == "fp32" == precision_of("fp32", ("NVIDIA H100",))
