"""What the driver bears: a thousand simulated members in its process, and real actors as fast as they go.

A step counts when its row is in MLflow, so a run's time goes to the end of the last flush. Members simulate in the
driver's own process: their share of its time is in the figures, too.
"""

import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.cluster import bench_cluster
from jobs.bench.simulated import SimulatedCluster
from jobs.environment import variables
from jobs.load import load
from jobs.stack.mlflow_server import ADMIN, check_installed, mlflow_server
from orchestrator.config import RunConfig, absolute
from orchestrator.driver import Options, run, run_on
from orchestrator.record.metrics import read_history
from orchestrator.record.result import RunResult
from orchestrator.record.watcher import Watcher
from orchestrator.stop import StopSignal
from workers.common.errors import TrainingError
from workers.reports import Report, StepDone

RATE = 50.0
"""Steps per second at which the members train, on their clock."""
ACTOR_STEPS = 300
MOST_WARNINGS = 5
"""Are shown."""
WARMUP_STEPS = 20
TINY = (
    *("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.kv_lora_rank=16"),
    *("model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=16", "model.intermediate_size=64"),
    *("model.moe_intermediate_size=24", "model.num_experts=4", "train.seq_len=64"),
)
"""The demo's model, so small that its steps cost next to nothing."""


def driver_load(
    overrides: list[str], steps: int, workers: int, actors: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Load the driver in four ways and return what each comes to.

    `paced`: simulated members at 50 steps per second, MLflow in a database file. `sqlite` and `server`: the same as
    fast as the driver takes what they tell, MLflow in a database file or behind a server that asks for a password.
    `actors`: real ones, on a local Ray.

    Args:
        overrides: of the demo's config.
        steps: of the simulated members.
        workers: simulated members.
        actors: real ones.
        say: takes a line about each.
    """
    check_installed()
    report: dict[str, Any] = {"steps": steps, "workers": workers, "actors": actors}
    with tempfile.TemporaryDirectory(prefix="raymuon-load-") as temporary:
        folder = Path(temporary)
        database = f"sqlite:///{folder}/mlflow.db"
        report["paced"] = simulated(folder, database, workers, steps, overrides, real_time=True)
        say(f"paced: {report['paced']}")
        report["sqlite"] = simulated(folder, database, workers, steps, overrides)
        say(f"sqlite: {report['sqlite']}")
        password, server = secrets.token_hex(16), folder / "server"
        server.mkdir()
        with (
            mlflow_server(server, f"{server}/artifacts", password, {}) as uri,
            variables(MLFLOW_TRACKING_USERNAME=ADMIN, MLFLOW_TRACKING_PASSWORD=password),
        ):
            report["server"] = simulated(folder, uri, workers, steps, overrides)
        say(f"server: {report['server']}")
        if actors:
            report["actors"] = real(folder, database, actors, overrides)
            say(f"actors: {report['actors']}")
    return report


def simulated(
    folder: Path,
    uri: str,
    workers: int,
    steps: int,
    overrides: list[str],
    real_time: bool = False,
    rate: float = RATE,
    every: int = 100,
) -> dict[str, Any]:
    """Lead a run of simulated members to its end, in this process.

    Args:
        folder: for its files.
        uri: of MLflow.
        workers: members.
        steps: of the run.
        overrides: of the demo's config.
        real_time: not as fast as the driver takes what they tell.
        rate: steps per second of the members' time.
        every: steps between checkpoints, with which the journal is shipped.

    Raises:
        TrainingError: a step is not in MLflow, or is there twice.
    """
    text = Path(__file__).with_name("simulated.py")
    config = _config(folder, uri, workers, steps, [f"checkpoint.every={every}", f"data.source={text}", *overrides])
    watch = _Watch(steps)
    done: dict[str, float] = {}

    def artifacts(_: RunResult, record: Any) -> None:
        done.update(at=record.written_at, cpu=time.process_time(), most_waiting=record.most_waiting)

    with SimulatedCluster(rate, real_time) as cluster:
        result = run_on(cluster, config, "never", watch, StopSignal(), Options(artifacts=artifacts))
        seconds = done["at"] - cluster.began
        return {
            "steps_per_second": steps / seconds,
            "polls_per_second": cluster.polls / seconds,
            "steps_per_cpu_second": steps / (done["cpu"] - watch.cpu_began),
            "cpu_share": (watch.cpu_ended - watch.cpu_began) / (watch.ended - watch.began),
            "most_rows_waiting": int(done["most_waiting"]),
            "rss_mb": watch.rss_mb,
            "rows": _each_step_once(config, result, steps),
            "checkpoints": watch.checkpoints,
            "faults": result.recoveries,
            "warnings": watch.warnings[:MOST_WARNINGS],
        }


def real(folder: Path, uri: str, actors: int, overrides: list[str]) -> dict[str, Any]:
    """Train a tiny model with real actors on a local Ray, and measure what the driver takes of the machine.

    Raises:
        TrainingError: a step is not in MLflow, or is there twice.
    """
    batch = [f"train.global_batch={actors}", "train.micro_batch=1", "checkpoint.every=0"]
    config = _config(folder, uri, actors, ACTOR_STEPS, [*TINY, *batch, *overrides])
    watch = _Watch(ACTOR_STEPS, WARMUP_STEPS)
    with bench_cluster(1, cpus=actors) as cluster:
        result = run(config, "never", cluster.address, watch, StopSignal())
    steps = ACTOR_STEPS - WARMUP_STEPS
    seconds = watch.ended - watch.began
    return {
        "world_size": result.world_size,
        "steps_per_second": steps / seconds,
        "driver_cpu_seconds_per_step": (watch.cpu_ended - watch.cpu_began) / steps,
        "driver_cpu_share": (watch.cpu_ended - watch.cpu_began) / seconds,
        "rows": _each_step_once(config, result, ACTOR_STEPS),
        "warnings": watch.warnings[:MOST_WARNINGS],
    }


def _config(folder: Path, uri: str, workers: int, steps: int, overrides: list[str]) -> RunConfig:
    fixed = [
        f"train.steps={steps}",
        "train.validate_every=0",
        "train.sample_prompt=''",
        f"scaling.min_workers={workers}",
        f"scaling.max_workers={workers}",
        f"data.prepared_url={folder}/data",
        f"checkpoint.url={folder}/checkpoints",
        f"tracking.uri={uri}",
    ]
    return absolute(load("demo", [*fixed, *overrides]))


class _Watch(Watcher):
    """Looks at this process's memory and processor time on the way.

    Args:
        steps: of the run.
        warmup: the first steps, which do not count.
    """

    def __init__(self, steps: int, warmup: int = 1) -> None:
        self.warmup = warmup
        self.looks = {max(1, steps * percent // 100): f"{percent}%" for percent in (10, 50, 100)}
        self.rss_mb: dict[str, float] = {}
        self.warnings: list[str] = []
        self.checkpoints = 0
        self.began = self.cpu_began = self.ended = self.cpu_ended = 0.0

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def committed(self, step: int, url: str) -> None:
        self.checkpoints += 1

    def report(self, report: Report) -> None:
        if isinstance(report, StepDone):
            self.ended, self.cpu_ended = time.time(), time.process_time()
            if report.step == self.warmup:
                self.began, self.cpu_began = self.ended, self.cpu_ended
            if report.step in self.looks:
                self.rss_mb[self.looks[report.step]] = psutil.Process().memory_info().rss / 1e6


def _each_step_once(config: RunConfig, result: RunResult, steps: int) -> int:
    """Return the number of rows, as MLflow has them.

    Raises:
        TrainingError: a step is missing, or there twice.
    """
    from orchestrator.record.tracking import Tracking

    history = read_history(Tracking(config.tracking).client, result.run_id, "loss")
    if sorted(metric.step for metric in history) != list(range(1, steps + 1)):
        raise TrainingError(f"MLflow has {len(history)} rows of {steps} steps, or not each step once")
    return len(history)
