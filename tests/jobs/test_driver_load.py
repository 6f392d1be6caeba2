"""The driver under many members: the short form of `raymuon bench load`."""

from jobs.bench.driver_load import simulated


def test_each_step_is_in_mlflow_once_and_few_rows_wait(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    found = simulated(tmp_path, uri, 64, 200, [], real_time=True, rate=100.0, every=50)
    assert found["rows"] == 200, "each step once: `simulated` compares the numbers"
    assert found["most_rows_waiting"] < 200, "they go out meanwhile"
    assert not found["faults"] and not found["warnings"]
