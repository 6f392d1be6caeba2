"""The whole way of a run, on the local stack: submitted from another folder, hurt, stopped, resumed, replayed.

`make e2e` runs it at length; here it is short. The stack, and all clients, are processes as a person starts them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest

from orchestrator.config import TrackingConfig
from orchestrator.record.tracking import Tracking
from tests.e2e.conftest import RAYMUON
from tests.secrets_search import places_of
from tests.servers import proxy
from tests.warm import VARIABLE, real

CHROMIUM = shutil.which("chromium")
BATCH, LENGTH = 16, 64
OPTIONS = [
    *(
        f"train.global_batch={BATCH}",
        f"train.seq_len={LENGTH}",
        "train.validate_every=40",
        "train.validate_sequences=32",
    ),
    *("data.source=python-stdlib/asyncio", "optim.schedule=constant", "train.steps=100000"),
    *("checkpoint.every=10", "checkpoint.keep_last=0", "recovery.hang_s=30"),
]
"""It lasts until it is stopped, and is told its end when it goes on: nothing depends on how fast a step is."""
SECRETS = ("s3_key", "s3_secret", "mlflow_password", "ray_token")


@dataclass(frozen=True)
class Shell:
    """A terminal in which somebody has sourced the stack's `env.sh`."""

    folder: Path
    stack: Path
    process: subprocess.Popen
    environment: dict[str, str]
    overrides: list[str]

    def run(self, *arguments: str) -> str:
        return self.ended(0, *arguments).stdout

    def refused(self, code: int, *arguments: str) -> str:
        return self.ended(code, *arguments).stderr

    def ended(self, code: int, *arguments: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [RAYMUON, *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def json(self, *arguments: str) -> dict:
        return json.loads(self.run(*arguments, "--json").splitlines()[-1])

    @property
    def mlflow(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.environment["MLFLOW_TRACKING_URI"])

    def workers(self) -> list[psutil.Process]:
        """Find the run's workers: what Ray has started stands for them."""
        found = []
        for stand_in in self.processes("default_worker.py"):
            with suppress(psutil.Error):
                worker = psutil.Process(real(stand_in.pid, Path(self.environment[VARIABLE])))
                if "ray::Worker" in " ".join(worker.cmdline()):
                    found.append(worker)
        return found

    def processes(self, title: str) -> list[psutil.Process]:
        """Find processes of the stack by their title."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def shell(tmp_path_factory, warm) -> Iterator[Shell]:
    stack, folder = tmp_path_factory.mktemp("stack"), tmp_path_factory.mktemp("elsewhere")
    command = [RAYMUON, "stack", "--folder", str(stack), "--nodes", "3"]
    with (stack / "stack.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **warm})
    try:
        while "Ctrl-C ends it" not in (stack / "stack.log").read_text():
            assert process.poll() is None, (stack / "stack.log").read_text()
            time.sleep(0.2)
        lines = (stack / "env.sh").read_text().splitlines()
        environment = dict(line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
        told = next(line for line in (stack / "stack.log").read_text().splitlines() if "raymuon submit" in line)
        overrides = [word for word in told.split() if "=" in word]
        with pytest.MonkeyPatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            yield Shell(folder, stack, process, {**environment, **warm}, overrides)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def wait_for(shell: Shell, run_id: str, step: int, recoveries: int = 0, workers: int = 1) -> None:
    """Wait until MLflow has a step of a run, after so many recoveries and of so many workers."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = shell.mlflow.get_run(run_id).data
        reached, survived = found.metrics.get("run/tokens", 0), int(found.tags.get("raymuon.recoveries", 0))
        enough = reached >= step * BATCH * LENGTH and survived >= recoveries
        if enough and found.metrics.get("run/world_size", 0) >= workers:
            return
        time.sleep(0.5)  # Each look costs MLflow a twentieth of a second.
    raise AssertionError(f"step {step} never came:\n{shell.run('logs', run_id)}")


def kill_node(shell: Shell) -> None:
    """SIGKILL a node that has a worker, with everything on it."""
    workers = {worker.pid for worker in shell.workers()}
    folder = Path(shell.environment[VARIABLE])
    victim = next(
        raylet
        for raylet in shell.processes("raylet/raylet")
        if workers & {real(child.pid, folder) for child in raylet.children()}
    )
    for process in [*victim.children(recursive=True), victim]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def finished(shell, request) -> str:
    """A run that has lost a worker and a node, was stopped, and went on to its end."""
    steps = request.config.getoption("--e2e-steps")
    (shell.folder / "found.yaml").write_text("optim: {momentum: 0.9}\nfrom: {study: momenta, run: abc}\n")
    run_id = shell.json("submit", "demo-llama", "--with", "found.yaml", *shell.overrides, *OPTIONS)["run_id"]
    wait_for(shell, run_id, max(15, steps // 6), workers=2)
    shell.workers()[0].kill()
    wait_for(shell, run_id, steps // 3, recoveries=1, workers=2)
    kill_node(shell)
    wait_for(shell, run_id, steps // 2, recoveries=2)
    shell.run("stop", run_id)
    stopped = shell.json("status", run_id)
    assert stopped["status"] == "KILLED" and "STOPPED" in stopped["job"]
    shell.json("resume", run_id, f"train.steps={max(steps, stopped['step'] + 15)}")
    shell.run("logs", run_id, "--follow")
    return run_id


def test_a_submitted_run_survives_and_is_on_record_once(shell, finished):
    told = shell.json("status", finished)
    steps = told["steps"]
    assert told["status"] == "FINISHED" and told["step"] == steps < 10_000 and told["recoveries"] >= 2
    assert told["checkpoint"] == f"s3://raymuon/runs/{finished}@{steps}"
    assert told["settings"] == "optim.momentum=0.9 from found.yaml of study momenta, run abc", "through stop and resume"
    assert shell.mlflow.get_run(finished).data.params["optim.momentum"] == "0.9"
    history = shell.mlflow.get_metric_history(finished, "loss/train")
    assert sorted(metric.step for metric in history) == list(range(1, steps + 1))


def test_mlflow_is_the_monitor(shell, finished):
    run = shell.mlflow.get_run(finished)
    assert {"run/world_size", "run/recovery_seconds", "run/goodput"} <= run.data.metrics.keys()
    nodes = {name.split("/")[1] for name in run.data.metrics if name.startswith("system/")}
    assert len(nodes) >= 2, "a node that had no worker has no keeper"
    files = {artifact.path for artifact in shell.mlflow.list_artifacts(finished)}
    assert {"config.yaml", "events.json", "loss.png", "plan.json", "recovery.md"} <= files
    description = run.data.tags["mlflow.note.content"]
    assert finished in description and "fault (" in description and run.data.tags["raymuon.job_id"] in description
    assert run.data.tags["raymuon.commit"] and run.data.tags["raymuon.code"]


def test_a_replay_is_bitwise_the_record_and_after_a_fault_within_the_tolerance(shell, finished):
    sizes = {metric.step: metric.value for metric in shell.mlflow.get_metric_history(finished, "run/world_size")}
    hurt_at = next(step for step in sorted(sizes) if sizes[step] == 1)
    calm = shell.json("replay", finished, "--steps", f"{hurt_at - 12}:{hurt_at - 1}")
    assert calm["verdict"] == "bitwise equal" and calm["recorded_world_sizes"] == [calm["world_size"]] == [2]
    hurt = shell.json("replay", finished, "--steps", f"{hurt_at - 3}:{hurt_at + 8}", "--workers", "1")
    assert hurt["verdict"] in ("bitwise equal", "equal within the tolerance") and hurt["world_size"] == 1
    assert len(hurt["recorded_world_sizes"]) == 2, "the fault changed the group"
    assert hurt["trained_from"] >= hurt_at - 14, "from the nearest checkpoint"


def test_a_replay_with_another_seed_is_refused(shell, finished):
    told = shell.refused(2, "replay", finished, "--steps", "1:2", "seed=5")
    assert "seed: the checkpoint has 0, the config 5" in told


def test_a_replay_that_is_interrupted_compares_nothing(shell, finished):
    command = [RAYMUON, "replay", finished, "--steps", "1:30"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=shell.folder, env={**os.environ, **shell.environment}, **pipes)
    limit = threading.Timer(180, process.kill)
    limit.start()
    told = []
    for line in process.stdout:
        told.append(line)
        if line.startswith("step 0: validation loss"):
            process.send_signal(signal.SIGINT)
    code = process.wait()
    limit.cancel()  # Otherwise pytest would wait for it at its end.
    assert code == 130, told
    assert "nothing is compared; replay it again" in told[-1] and "bitwise" not in "".join(told)


def test_a_submission_whose_answer_is_lost_is_withdrawn(shell):
    """The head has taken the job, and only that is not known: neither a job nor a run may be left.

    The address of the command line counts: the environment names the head itself, which Ray's client would take.
    """
    head = shell.environment["RAY_API_SERVER_ADDRESS"]
    before = {run.info.run_id for run in runs_of(shell)}
    with proxy(head, lambda method, path: "no reply" if (method, path) == ("POST", "/api/jobs/") else None) as address:
        shell.refused(3, "submit", "demo-llama", *shell.overrides, "train.steps=1000", "--address", address)
    (withdrawn,) = [run for run in runs_of(shell) if run.info.run_id not in before]
    assert withdrawn.info.lifecycle_stage == "deleted"
    deadline = time.monotonic() + 180
    while (statuses := statuses_of_jobs(shell, withdrawn.info.run_id)) != ["STOPPED"]:
        assert time.monotonic() < deadline, statuses
        time.sleep(0.5)


def statuses_of_jobs(shell: Shell, run_id: str) -> list[str]:
    """Ask from a process of its own: in this one Ray may have begun without a token."""
    code = "import json, sys; from jobs.ray_jobs import Jobs; jobs = Jobs(sys.argv[1]);"
    code += "print(json.dumps([jobs.info(job)['status'] for job in jobs.of_run(sys.argv[2])]))"
    command = [sys.executable, "-c", code, shell.environment["RAY_API_SERVER_ADDRESS"], run_id]
    return json.loads(subprocess.check_output(command, env={**os.environ, **shell.environment}, text=True))


def runs_of(shell: Shell) -> list[mlflow.entities.Run]:
    experiments = [experiment.experiment_id for experiment in shell.mlflow.search_experiments()]
    return shell.mlflow.search_runs(experiments, run_view_type=mlflow.entities.ViewType.ALL)


def test_no_secret_is_anywhere(shell, finished):
    """Each secret of the stack is looked for in every file and answer that the run has left."""
    drawn = json.loads((shell.stack / "secrets.json").read_text())
    secrets = {name: drawn[name] for name in SECRETS}
    found = places_of(shell, finished, secrets)
    assert found.searched > 50 and not found.places


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_the_page_of_the_run_shows_how_it_went(shell, finished, request):
    """MLflow's own UI, in a browser: loss, world size and recovery on one page, and the description with the events."""
    from playwright.sync_api import sync_playwright

    credentials = {
        "username": shell.environment["MLFLOW_TRACKING_USERNAME"],
        "password": shell.environment["MLFLOW_TRACKING_PASSWORD"],
    }
    server = Tracking(TrackingConfig(uri=shell.environment["MLFLOW_TRACKING_URI"]))
    page_of_run = f"{server.uri}/{server.page(finished)}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(http_credentials=credentials, viewport={"width": 1500, "height": 1250})
        page.goto(page_of_run.replace("/model-metrics", ""))
        page.get_by_text("training again after").first.wait_for(timeout=120_000)
        page.goto(page_of_run)
        page.get_by_text("Add section").wait_for(timeout=120_000)
        groups = r"^(loss|optim|performance|run|telemetry/\w+|traffic)\n\(\d+\)$"  # Each with its number of charts.
        shown = re.findall(groups, page.locator("body").inner_text(), re.MULTILINE)
        assert shown[:4] == ["loss", "optim", "performance", "run"] and shown == sorted(shown)
        search = page.get_by_placeholder("Search metric charts").first
        search.fill("^(loss/.*|run/(world_size|recovery_seconds|goodput))$")
        for metric in ("train", "validation", "world_size", "recovery_seconds", "goodput"):
            page.get_by_text(metric, exact=True).first.wait_for(timeout=120_000)
        page.locator(".js-plotly-plot .trace, .js-plotly-plot .bars").first.wait_for(timeout=120_000, state="attached")
        if picture := request.config.getoption("--screenshot"):
            page.wait_for_timeout(3000)  # Plotly's animation.
            page.screenshot(path=picture, clip={"x": 196, "y": 0, "width": 916, "height": 1000})  # Without the panels.
        browser.close()
