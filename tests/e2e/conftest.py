import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from jobs.stack.seaweed import s3_environment, seaweedfs
from orchestrator.record.metrics import read_history
from tests.ledger import assert_every_sample_once
from tests.servers import ray_cluster
from tests.warm import warm_pythons
from workers.common.storage import Store
from workers.data.corpus import load
from workers.recipe import TrainConfig

RAYMUON = str(Path(sys.executable).with_name("raymuon"))
TINY = """
run: {name: tiny}
model: {hidden_size: 32, num_layers: 2, num_heads: 2, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8,
        v_head_dim: 16, intermediate_size: 64, moe_intermediate_size: 24, num_experts: 4, num_experts_per_token: 2,
        num_shared_experts: 1, router_bias_rate: 0.01, init_std: 0.1}
data: {source: TEXTS}
optim: {lr: 1.0e-2, eps: 1.0e-3, schedule: wsd, decay_fraction: 0}
train: {steps: 120, global_batch: 12, micro_batch: 4, seq_len: 64, validate_every: 30, validate_sequences: 8,
        sample_bytes: 50}
scaling: {min_workers: 2, max_workers: 2, wait_s: 60}
checkpoint: {every: 20, keep_last: 0}
"""


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """The environment in which commands and Ray's workers are warm."""
    with warm_pythons(tmp_path_factory.mktemp("warm")) as environment:
        yield environment


@pytest.fixture(scope="session")
def cluster(warm):
    with ray_cluster(4, warm) as address:
        yield address


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory):
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        yield endpoint


def marked(mark: str) -> list[str]:
    """Return the names of the processes that were started with this RAYMUON_TEST and live."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYMUON_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except psutil.Error:
            continue
    return found


@dataclass(frozen=True)
class Place:
    """A folder in which a person runs raymuon."""

    folder: Path
    address: str
    warm: dict[str, str]

    def command(self, *arguments: str, address: str | None = "") -> list[str]:
        joined = self.address if address == "" else address
        return [RAYMUON, "train", "tiny.yaml", *arguments, *(["--address", joined] if joined else [])]

    def environment(self, **others: str) -> dict[str, str]:
        return {**os.environ, **s3_environment(), **self.warm, **others}

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        environment = self.environment(**options.pop("env", {}))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(self.command(*arguments, **options), cwd=self.folder, env=environment, **pipes)

    def run(self, *arguments: str, code: int = 0, **options) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=180)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err + out
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def train(self, *arguments: str, **options) -> dict:
        return json.loads(self.run(*arguments, "--json", **options).stdout.splitlines()[-1])

    def checkpoints(self, *arguments: str) -> object:
        command = [RAYMUON, "checkpoints", *arguments, "--json"]
        return json.loads(subprocess.check_output(command, cwd=self.folder, env=self.environment(), text=True))

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{self.folder}/runs/mlflow.db")
        return [(m.step, m.value) for m in read_history(client, run_id, metric)]

    def assert_every_sample_once(self) -> None:
        (index,) = (self.folder / "runs" / "data").glob("*/index.json")
        train = TrainConfig(steps=120, global_batch=12, micro_batch=4, seq_len=64)
        assert_every_sample_once(self.folder / "ledger", train, 0, (load(Store(str(index.parent))),))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A small corpus of real text: some modules of the standard library."""
    folder = tmp_path_factory.mktemp("texts")
    library = Path(os.__file__).parent
    for name in ("argparse", "ast", "datetime", "inspect", "pathlib", "typing", "subprocess", "tarfile"):
        (folder / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())
    return folder


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An MLflow database with its tables: making them takes seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    with contextlib.chdir(path.parent):  # The artifacts of its experiment `Default` go to where it was made.
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def make_place(tmp_path_factory, texts, cluster, database, warm):
    def make(name: str) -> Place:
        folder = tmp_path_factory.mktemp(name)
        (folder / "runs").mkdir()
        shutil.copy(database, folder / "runs" / "mlflow.db")
        # A person's own folders, by names that ours have, too: nothing of them may be imported.
        for name in ("optim", "workers"):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text("raise RuntimeError('this is not raymuon')")
        (folder / "tiny.yaml").write_text(TINY.replace("TEXTS", str(texts)))
        return Place(folder, cluster, warm)

    return make


@pytest.fixture
def place(make_place):
    return make_place("place")


@pytest.fixture(scope="session")
def uninterrupted(make_place):
    """A run of `tiny.yaml` to its end, with which others are compared: its place and its result."""
    place = make_place("uninterrupted")
    return place, place.train()
