"""Nothing that is read from storage is ever unpickled: no load path can, and a file that would tell is not run."""

import ast
import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.checkpoints import diff, list_checkpoints, show, verify
from jobs.export import export
from jobs.import_ import import_model
from orchestrator.log.run_log import RunLog
from orchestrator.record.events import DriverStarted
from orchestrator.record.journal import Journal, read_journal
from tests.jobs.test_export import trained
from workers.common.errors import RaymuonError
from workers.common.source import ROOMS
from workers.common.storage import Store
from workers.data.config import DataConfig
from workers.data.prepare import prepare

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.package"}
CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "np.load",
    "numpy.load",
    "np.fromfile",
    "yaml.load",
    "yaml.unsafe_load",
    "eval",
    "exec",
    "__import__",
}
ENDINGS = (".load_checkpoint", ".load_module_state_dict", "_object", "_object_list", ".read_pickle", ".unsafe_load")
"""DeepSpeed's loading, and the collectives of torch that unpickle."""
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only"}


def ways_to_unpickle(source: str) -> list[str]:
    """Return every import, call and keyword with which Python code could unpickle something or run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name in MODULES]
            case ast.ImportFrom(module=module, names=names) if module:
                found += [module] if module in MODULES else []
                found += [f"{module}.{n.name}" for n in names if f"{module}.{n.name}" in CALLS | MODULES]
            case ast.Call(func=func, keywords=keywords):
                name = ast.unparse(func)
                found += [name] if name in CALLS or name.endswith(ENDINGS) else []
                found += [word.arg for word in keywords if word.arg in KEYWORDS]
    return found


def test_no_room_has_a_way_to_unpickle():
    files = [file for room in ROOMS for file in Path(__file__).parents[1].joinpath(room).rglob("*.py")]
    assert len(files) > 50
    assert {str(file): found for file in files if (found := ways_to_unpickle(file.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import torch\nx = torch.load('x', weights_only=True)",
        "engine.load_checkpoint(folder)",
        "dist.broadcast_object_list(x)",
        "np.load(file, allow_pickle=True)",
    ],
)
def test_the_search_finds_one(source):
    assert ways_to_unpickle(source)


class Payload:
    """Makes the folder `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["pickle", "torch.save", "np.save"])
def payload(request, tmp_path):
    """The bytes of a file that makes the folder `marker` when it is unpickled; it must not be there at the end."""
    marker, file = tmp_path / "marker", io.BytesIO()
    match request.param:
        case "pickle":
            pickle.dump(Payload(marker), file)
        case "torch.save":
            torch.save(Payload(marker), file)
        case "np.save":
            np.save(file, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    file.seek(0)
    {
        "pickle": pickle.load,
        "torch.save": lambda f: torch.load(f, weights_only=False),
        "np.save": lambda f: np.load(f, allow_pickle=True),
    }[request.param](file)
    marker.rmdir()  # It works.
    yield file.getvalue()
    assert not marker.exists()


def test_a_payload_in_place_of_any_file_of_a_run(tmp_path, payload):
    whole = tmp_path / "whole"
    trained(whole, "llama", steps=(10, 20))
    journal = Journal(Store(str(whole)), 1)
    journal.add(DriverStarted(time=1.0, step=0, attempt=1))
    journal.ship()
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    assert len(files) == 3 + 2 + 2 + 1, "the log, the manifests, the shards, the journal"
    for number, file in enumerate(files):
        run = tmp_path / f"run-{number}"
        shutil.copytree(whole, run)
        (run / file).write_bytes(payload)
        url = str(run)
        harmed = 0
        for read in (
            lambda: list_checkpoints(url),  # noqa: B023
            lambda: show(url),  # noqa: B023
            lambda: verify(url),  # noqa: B023
            lambda: diff(f"{url}@10", f"{url}@20"),  # noqa: B023
            lambda: RunLog(Store(url)).newest_good(),  # noqa: B023
            lambda: list(read_journal(Store(url), print)),  # noqa: B023
            lambda: export(url, f"{url}-hf", "float32"),  # noqa: B023
        ):
            try:
                read()
            except RaymuonError:
                harmed += 1
        assert harmed or "00000010" in str(file) or file.parts[0] in ("log", "journal"), file


def test_a_payload_beside_and_in_place_of_a_hugging_face_model(tmp_path, payload):
    trained(tmp_path / "run", "llama")
    export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pt"):
        (tmp_path / "hf" / name).write_bytes(payload)
    import_model(str(tmp_path / "hf"), str(tmp_path / "imported"))
    (tmp_path / "hf" / "model.safetensors").write_bytes(payload)
    with pytest.raises(RaymuonError, match="not a safetensors file"):
        import_model(str(tmp_path / "hf"), str(tmp_path / "other"))
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(RaymuonError, match="other formats are not read"):
        import_model(str(tmp_path / "hf"), str(tmp_path / "other"))


def test_a_payload_in_place_of_prepared_data(tmp_path, payload):
    config = DataConfig(source=__file__, prepared_url=f"{tmp_path}/data", held_out_fraction=0.2)
    prepare(config)
    for file in [path for path in (tmp_path / "data").rglob("*") if path.is_file()]:
        kept = file.read_bytes()
        file.write_bytes(payload)
        try:
            prepare(config)
        except RaymuonError as error:
            assert file.name in str(error)
        file.write_bytes(kept)
