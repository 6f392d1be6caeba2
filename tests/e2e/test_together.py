"""Two runs at the same time in one process, on one cluster that it has joined: neither is in the other's way."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from jobs.environment import variables
from jobs.stack.seaweed import BUCKET, s3_environment
from orchestrator.config import TrackingConfig
from orchestrator.driver import run_on
from orchestrator.group.cluster import connected
from orchestrator.log.run_log import RunLog
from orchestrator.record.metrics import read_history
from orchestrator.record.watcher import Watcher
from orchestrator.stop import StopSignal
from tests.leading import Lead, config_of
from tests.processes import ProcessCluster
from tests.servers import rclone
from tests.workers.test_loop import TEXT
from workers.common.storage import Store
from workers.config import StorageConfig

PLACE = f"s3://{BUCKET}/together"
STEPS = 12


class Quiet(Watcher):
    """Keeps what a person would be warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def config_on(endpoint: str, folder, text: bytes):
    """A run whose text, tokens and checkpoints are on one server, at the URLs that the other run has on another."""
    Store(f"{PLACE}/texts", endpoint).put("a.txt", text)
    one = {"min_workers": 1, "max_workers": 1}
    config = config_of(folder, scaling=one, train={"steps": STEPS})
    data = replace(config.data, source=f"{PLACE}/texts/a.txt", prepared_url=f"{PLACE}/data")
    return replace(
        config,
        data=data,
        checkpoint=replace(config.checkpoint, url=f"{PLACE}/runs"),
        storage=StorageConfig(s3_endpoint=endpoint),
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )


def test_two_runs_on_two_s3_servers_share_a_cluster(cluster, s3_endpoint, tmp_path):
    """The same URLs at two endpoints; each comes to what it comes to alone, and to nothing of the other's."""
    text, served = TEXT.read_bytes(), tmp_path / "rclone" / "served"
    served.mkdir(parents=True)
    with rclone(served) as other, variables(**s3_environment()):
        configs = [config_on(s3_endpoint, tmp_path, text), config_on(other, tmp_path, text[: len(text) // 2])]
        alone = []
        for number, config in enumerate(configs):
            with Lead(config, ProcessCluster({"a": 1}), tmp_path / str(number), f"{PLACE}/alone") as lead:
                alone.append(lead.wait().losses)
        assert alone[0] != alone[1]
        watchers = [Quiet(), Quiet()]
        with connected(cluster, StopSignal()) as joined, ThreadPoolExecutor(2) as threads:
            begun = [
                threads.submit(run_on, joined, config, "never", watcher, StopSignal())
                for config, watcher in zip(configs, watchers, strict=True)
            ]
            results = [run.result(240) for run in begun]
        told = ["does not honour conditional creates" in " ".join(watcher.warnings) for watcher in watchers]
        assert told == [False, True], "rclone's server does not, and only its run is told"
        from orchestrator.record.tracking import Tracking

        client = Tracking(configs[0].tracking).client
        for config, result, losses in zip(configs, results, alone, strict=True):
            assert (result.status, result.steps, result.recoveries) == ("finished", STEPS, 0)
            assert result.losses[0] == list(enumerate(losses, 1))
            history = sorted((row.step, row.value) for row in read_history(client, result.run_id, "loss"))
            assert history == list(enumerate(losses, 1)), "each step once"
            runs = Store(config.checkpoint.url, config.storage.s3_endpoint)
            assert runs.names("") == [result.run_id], "nothing of the other's"
            log = RunLog(runs.child(result.run_id))
            assert log.commits[-1].step == STEPS
            assert client.get_run(result.run_id).data.tags["raymuon.checkpoint"] == f"{log.store.url}@{STEPS}"
