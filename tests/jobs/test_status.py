"""What `raymuon status` says of a run, against a real database."""

import json

from jobs.control import status
from jobs.runs import find
from orchestrator.config import TrackingConfig
from orchestrator.record.tracking import RunRecord, Tracking


def test_numbers_are_numbers_and_a_run_that_nobody_submitted_has_no_job(tmp_path, capsys):
    tracking = Tracking(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    run_id = tracking.create("[a]", {"train.global_batch": 16, "train.seq_len": 256, "train.steps": 400})
    record = RunRecord(tracking, run_id)
    record.log("train", 36, 1.0, {"loss": 2.25, "tokens": 140123, "world_size": 2, "tokens_per_second": 2451.5})
    record.note(36, 1.0, {"faults": 1})
    record.tag("raymuon.recoveries", "1")
    record.close("KILLED")
    found = find(run_id, tracking.uri)
    status(found, "", False, as_json=True)
    told = json.loads(capsys.readouterr().out)
    expected = {"step": 36, "steps": 400, "loss": 2.25, "tokens": 140123, "world_size": 2, "faults": 1, "recoveries": 1}
    assert {key: told[key] for key in expected} == expected and told["job"] is None
    assert all(isinstance(told[key], int) for key in expected if key != "loss") and told["tokens_per_second"] == 2451.5
    status(found, "", False, as_json=False)
    shown = capsys.readouterr().out
    assert "36 of 400" in shown and "140,123" in shown and "[a]" in shown and "job" not in shown
