"""A preparation on a bucket whose tasks, driver and store are killed: the tokens are those of an undisturbed one."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from jobs.stack.seaweed import BUCKET, s3_environment, seaweedfs
from tests.servers import variables
from workers.common.storage import Store
from workers.data import prepare as prepare_module
from workers.data.config import DataConfig
from workers.data.prepare import prepare

FILES = 24
DRIVER = """
import sys, time
from orchestrator.preparation import prepare_on
from orchestrator.stop import StopSignal
from workers.data import prepare
from workers.data.config import DataConfig
prepare.GROUP_BYTES = 1  # A group for each file.
made = prepare.make_group
def slowly(work, group):
    time.sleep(0.1)
    return made(work, group)
prepare.make_group = slowly
source, to, endpoint, address = sys.argv[1:]
works = prepare.works_of(DataConfig(source=source, prepared_url=to, deduplicate=True), s3_endpoint=endpoint)
prepare_on(works, address, StopSignal(), lambda work, group, note: print("made", flush=True))
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Files of rows, some of which are in another file, too."""
    folder, dice = tmp_path_factory.mktemp("rows"), random.Random(0)
    for number in range(FILES):
        texts = [f"row {dice.randrange(3000)} of all" * 20 for _ in range(200)]
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        (folder / f"{number:02d}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    return folder


@pytest.fixture(scope="module")
def calm(rows, tmp_path_factory) -> dict[str, str]:
    """What an undisturbed preparation in one process leaves."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "GROUP_BYTES", 1)
        prepare(DataConfig(source=str(rows), prepared_url=str(folder), deduplicate=True))
    return files_of(Store(str(folder)))


def files_of(store: Store) -> dict[str, str]:
    names = sorted(store.files(""))
    assert names
    contents = zip(names, store.read_all(names), strict=True)
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents}


class Bucket:
    """A SeaweedFS that can die and come back with its files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.stack = folder, 0, ExitStack()

    def start(self) -> str:
        endpoint = self.stack.enter_context(seaweedfs(self.folder, port=self.port or None))
        self.port = int(endpoint.rpartition(":")[2])
        return endpoint

    def kill(self) -> None:
        for process in psutil.process_iter(["cmdline"]):
            if f"-dir={self.folder}" in (process.info["cmdline"] or []):
                process.kill()
                process.wait()
        self.stack.close()


@pytest.fixture
def bucket(tmp_path):
    with variables(**s3_environment()):
        (tmp_path / "weed").mkdir()
        bucket = Bucket(tmp_path / "weed")
        bucket.start()
        yield bucket
        bucket.kill()


def driver(rows: Path, bucket: Bucket, address: str) -> subprocess.Popen:
    arguments = [str(rows), f"s3://{BUCKET}/tokens", f"http://127.0.0.1:{bucket.port}", address]
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", DRIVER, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | s3_environment())


def await_groups(process: subprocess.Popen, count: int) -> None:
    assert process.stdout
    while count:
        line = process.stdout.readline()  # Ray has lines of its own for tasks that die.
        assert line, "it has ended"
        count -= line == "made\n"


def kill_tasks() -> int:
    killed = 0
    for process in psutil.process_iter(["name", "cmdline"]):
        if " ".join(process.info["cmdline"] or []).startswith("ray::_patiently"):
            process.kill()
            killed += 1
    return killed


def test_the_result_is_that_of_an_undisturbed_one(rows, calm, bucket, cluster):
    process = driver(rows, bucket, cluster)
    await_groups(process, 3)
    killed = kill_tasks()
    await_groups(process, 3)
    bucket.kill()
    time.sleep(2)
    bucket.start()
    await_groups(process, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process = driver(rows, bucket, cluster)
    await_groups(process, 3)
    killed += kill_tasks()
    left = process.communicate(timeout=180)[0].splitlines()
    assert killed and left[-1] == "done"
    assert left.count("made") <= FILES - 12, "what is finished is not made again"
    assert files_of(Store(f"s3://{BUCKET}/tokens", f"http://127.0.0.1:{bucket.port}")) == calm
