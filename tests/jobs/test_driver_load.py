"""The driver under many members: the short form of `raymuon bench load`."""

from jobs.bench.driver_load import simulated


def test_each_step_is_in_mlflow_once_and_few_rows_wait(tmp_path):
    found = simulated(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", 64, 200, False, [], every=50)
    assert found["rows"] == 200, "each step once: `simulated` compares the numbers"
    assert found["most_rows_waiting"] <= 150, "a commit flushes, every 50 steps; a pulse may carry some more"
    assert not found["faults"] and not found["warnings"]
