"""A branch by the command line, its replay, and workers that Ray's runs pass on to each other."""

import json
import shutil
import subprocess
import time
from dataclasses import replace

from orchestrator.config import TrackingConfig
from orchestrator.driver import run_on
from orchestrator.group.cluster import connected
from orchestrator.group.warm import warm
from orchestrator.record.events import Event, Membership
from orchestrator.record.watcher import Watcher
from orchestrator.stop import StopSignal
from tests.e2e.conftest import RAYMUON, Place
from tests.leading import config_of

AT, STEPS = 80, 120


def told(place: Place, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [RAYMUON, *arguments, "--address", place.address]
    done = subprocess.run(command, cwd=place.folder, env=place.environment(), text=True, capture_output=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


def test_a_branch_is_its_parent_from_there_on_and_is_replayed_from_its_parents_checkpoint(uninterrupted, place):
    whole, parent = uninterrupted
    run = f"{whole.folder}/runs/checkpoints/{parent['run_id']}"
    branch = place.train(f"train.init={run}@{AT}", "train.init_state=run", "checkpoint.every=30", "run.name=branch")
    for metric in ("loss", "lr", "tokens"):
        theirs = [row for row in whole.history(parent["run_id"], metric) if row[0] > AT]
        assert place.history(branch["run_id"], metric) == theirs and len(theirs) == STEPS - AT
    assert (branch["steps"], branch["tokens"]) == (STEPS, parent["tokens"]) and branch["recoveries"] == 0
    assert branch["val_loss"] == parent["val_loss"] and branch["checkpoint"].endswith(f"{branch['run_id']}@{STEPS}")
    steps = f"{AT + 1}:{AT + 4}"
    replayed = json.loads(told(place, "replay", branch["run_id"], "--steps", steps, "--json").stdout.splitlines()[-1])
    assert (replayed["trained_from"], replayed["verdict"]) == (AT, "bitwise equal") and replayed["compared"] >= 8
    refused = told(place, "replay", branch["run_id"], "--steps", f"{AT}:{AT + 1}", code=2).stderr
    assert f"step {AT} is before the first of this branch, {AT + 1}; replay its parent, {parent['run_id']}" in refused


class Seen(Watcher):
    """Keeps which processes have trained."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def event(self, event: Event) -> None:
        if isinstance(event, Membership):
            self.pids += event.pids


def test_runs_on_one_ray_pass_their_worker_on(cluster, tmp_path, database):
    shutil.copy(database, tmp_path / "mlflow.db")
    config = config_of(tmp_path, train={"steps": 4}, checkpoint={"url": f"{tmp_path}/runs"}, scaling={"wait_s": 120.0})
    config = replace(config, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    seen, losses, seconds = Seen(), [], []
    with connected(cluster, StopSignal()) as joined, warm(joined) as kept:
        for _ in range(3):
            began = time.monotonic()
            result = run_on(kept, config, "never", seen, StopSignal())
            losses.append(result.losses[0])
            seconds.append(time.monotonic() - began)
    print("seconds", seconds)
    assert len(seen.pids) == 3 and len(set(seen.pids)) == 1 and losses[0] == losses[1] == losses[2]
