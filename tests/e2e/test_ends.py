"""Every signal at every moment, to the driver alone and to its process group: what is left of a run on a local Ray.

By default a few of them; all with --all-signals (`make signals`), which prints a table.
"""

import os
import pty
import signal
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass, field

import mlflow
import pytest

from orchestrator.log.run_log import RunLog
from tests.e2e.conftest import RAYMUON, Place, marked
from tests.e2e.test_resume import wait_for_step, workers_of
from tests.leading import tensors_of
from tests.ledger import ledger
from tests.warm import COLD
from workers.common.storage import Store

MOMENTS = ("start", "training", "saving", "back-off")
ENDING = ("INT", "TERM", "QUIT")
CASES = [(name, moment, to) for name in ("HUP", "PIPE", *ENDING) for moment in MOMENTS for to in ("process", "group")]
FEW = [("HUP", "start", "group"), ("QUIT", "back-off", "group")]
"""The first goes on, and is ended by a SIGTERM to its group while it trains."""
OPTIONS = {
    "start": [],
    "training": [],
    "saving": ["checkpoint.every=15", "storage.max_upload_mb_per_s=0.1"],
    "back-off": ["recovery.free_retries=0", "recovery.backoff_s=600", "recovery.max_backoff_s=600"],
}
ORPHANS_S = 10.0


@dataclass
class Driver:
    """A driver on a local Ray, and what it says."""

    place: Place
    arguments: list[str]
    told: list[str] = field(default_factory=list)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    """In the environment of all that it starts."""

    def __post_init__(self) -> None:
        self.process = self.place.start(*self.arguments, address=None, env={"RAYMUON_TEST": self.mark, COLD: "raymuon"})
        threading.Thread(target=lambda: self.told.extend(self.process.stderr), daemon=True).start()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while not any(text in line for line in self.told):
            assert self.process.poll() is None and time.monotonic() < deadline, self.told
            time.sleep(0.01)

    def send(self, name: str, to: str) -> None:
        (os.killpg if to == "group" else os.kill)(self.process.pid, signal.Signals[f"SIG{name}"])

    @property
    def begun(self) -> int:
        """The last step that somebody has begun."""
        return max((line["step"] for line in ledger(self.place.folder / "ledger")), default=0)

    @property
    def run_ids(self) -> list[str]:
        return [log.parent.name for log in (self.place.folder / "runs" / "checkpoints").glob("*/log")]

    def statuses(self) -> list[str]:
        """MLflow's, of all runs."""
        client = mlflow.MlflowClient(f"sqlite:///{self.place.folder}/runs/mlflow.db")
        experiments = [one.experiment_id for one in client.search_experiments()]
        return [run.info.status for run in client.search_runs(experiments)]

    def orphans(self) -> list[str]:
        """Return what is left of it after ORPHANS_S, perhaps sooner if nothing is."""
        deadline = time.monotonic() + ORPHANS_S
        while True:
            left = marked(self.mark)
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)


def come_to(driver: Driver, moment: str) -> None:
    """Wait for the moment."""
    if moment == "start":
        driver.wait_for("starting Ray")
        return
    wait_for_step(driver.place, 20, attempt=1)
    if moment == "saving":
        assert not any(": checkpoint" in line for line in driver.told), "it is on its way"
    if moment == "back-off":
        workers_of(driver.place)[0].kill()
        driver.wait_for("trying again in 600 s")


def check_that_it_goes_on(driver: Driver, moment: str) -> None:
    if moment == "back-off":
        time.sleep(1.0)
    else:
        wait_for_step(driver.place, driver.begun + 10, attempt=1)
    assert driver.process.poll() is None


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = CASES if metafunc.config.getoption("--all-signals") else FEW
        metafunc.parametrize("case", cases, ids="-".join)


def test_a_signal(place, case):
    name, moment, to = case
    endless = ["train.steps=100000", "train.validate_every=0", "checkpoint.every=0", "checkpoint.snapshot_every=1"]
    driver = Driver(place, ["data.ledger=ledger", *endless, *OPTIONS[moment]])
    come_to(driver, moment)
    begun = driver.begun
    driver.send(name, to)
    ended_by = name
    if name not in ENDING:
        check_that_it_goes_on(driver, moment)
        begun, ended_by = driver.begun, "TERM"
        driver.send(ended_by, to)
    sent = time.monotonic()
    code = driver.process.wait(120)
    took, orphans = time.monotonic() - sent, driver.orphans()
    told, statuses = "".join(driver.told), driver.statuses()
    last_line = told.strip().splitlines()[-1]
    saved = 0
    if driver.run_ids:
        url = f"{place.folder}/runs/checkpoints/{driver.run_ids[0]}"
        saved = RunLog(Store(url)).manifest().step
        assert tensors_of(url)
    goes_on = "" if name == ended_by else ", goes on; then TERM"
    row = (f"{name}{goes_on}", moment, to, code, f"{begun} / {saved}", " ".join(statuses), len(orphans), f"{took:.1f}")
    print("\n|", " | ".join(map(str, row)), "|")
    assert code == 130 and "Traceback" not in told and "*** SIG" not in told, told
    assert not orphans
    if begun:
        assert saved >= begun - 1 and statuses == ["KILLED"], told
        assert last_line.endswith(f"--resume {driver.run_ids[0]}")
        assert "go on with: " in last_line and "raymuon train tiny.yaml" in last_line
    else:
        assert not saved and not statuses, told
        assert "nothing has begun; begin again with: " in last_line and "raymuon train tiny.yaml" in last_line


def test_a_terminal_that_vanishes_ends_nothing(place):
    """Its hang-up reaches the process that leads its session; from then on all output is an error (EIO)."""
    ours, theirs = pty.openpty()
    command = ["train.steps=60", "data.ledger=ledger", "checkpoint.every=20"]
    with os.fdopen(theirs, "wb") as terminal:
        process = subprocess.Popen(
            ["setsid", "--ctty", *place.command(*command)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
            cwd=place.folder,
            env=place.environment(TERM="xterm", **{COLD: "raymuon"}),
        )
    drain = threading.Event()

    def read() -> None:
        while not drain.is_set():
            os.read(ours, 4096)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for_step(place, 5, attempt=1)
    drain.set()
    reader.join()
    os.close(ours)
    assert process.wait(120) == 0
    (log,) = (place.folder / "runs" / "checkpoints").glob("*/log")
    assert RunLog(Store(str(log.parent))).manifest().step == 60
    client = mlflow.MlflowClient(f"sqlite:///{place.folder}/runs/mlflow.db")
    assert client.get_run(log.parent.name).info.status == "FINISHED"


def test_output_that_nobody_reads_ends_nothing(place):
    command = " ".join(place.command("train.steps=30", "train.validate_every=5"))
    done = subprocess.run(
        ["bash", "-c", f"{command} 2>&1 | head -2; echo ${{PIPESTATUS[0]}}"],
        cwd=place.folder,
        env=place.environment(**{COLD: "raymuon"}),
        capture_output=True,
        text=True,
        timeout=180,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[-1] == "0" and done.stderr == "", (lines, done.stderr)
    client = mlflow.MlflowClient(f"sqlite:///{place.folder}/runs/mlflow.db")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.info.status == "FINISHED" and "raymuon.error" not in run.data.tags


@pytest.mark.parametrize("command", ["config", "plan demo", "--help"])
def test_short_commands_take_a_closed_pipe_for_no_failure(command, tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"{RAYMUON} {command} | head -0; echo ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
