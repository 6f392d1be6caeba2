"""What was trained, opened by each name that it has."""

import mlflow
import pytest
import torch

from jobs.checkpoints import remove
from jobs.export import export
from jobs.trained import open_trained, series
from orchestrator.log.run_log import find_commit
from tests.jobs.test_export import TEXT, trained
from workers.common.errors import ConfigError, DamagedError, StorageError
from workers.data.tokenizer import BYTES
from workers.models import logits_of

TOKENS = torch.tensor([list(TEXT.encode())])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run's folder with two checkpoints, the MLflow that knows it, and the model that is in both."""
    root = tmp_path_factory.mktemp("trained")
    uri = f"sqlite:///{root}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("e"), run_name="my run").info.run_id
    model = trained(root / run_id, "moonlight", steps=(10, 20), run_id=run_id)
    client.log_param(run_id, "model.name", "moonlight")
    client.set_tag(run_id, "raymuon.checkpoint_url", str(root / run_id))
    return root / run_id, uri, model


def logits(opened) -> torch.Tensor:
    model = opened.model("float32")
    assert not model.training
    with torch.no_grad():
        return logits_of(model, TOKENS)


def test_a_run_is_the_same_model_by_each_of_its_names(run, monkeypatch):
    folder, uri, model = run
    monkeypatch.chdir(folder.parent)
    with torch.no_grad():
        exact = logits_of(model, TOKENS)
    for name in (str(folder), f"{folder}@10", folder.name, "my run", "my run@10", f"./{folder.name}@20"):
        opened = open_trained(name, uri)
        assert torch.equal(logits(opened), exact), name
        assert opened.step == (10 if name.endswith("@10") else 20)
        assert (opened.run_id, opened.seq_len, opened.tokenizer) == (folder.name, 128, BYTES)
        assert opened.where == f"{folder}@{opened.step}" and opened.tracked.name == "my run"
    assert open_trained(f"{folder}/", "sqlite:///nowhere.db").tracked is None
    assert [one.step for one in series("my run", uri)] == [10, 20]


def test_a_folder_is_the_model_that_was_exported(run, tmp_path):
    folder, uri, model = run
    export(str(folder), str(tmp_path / "hf"), "float32")
    opened = open_trained(str(tmp_path / "hf"), uri)
    with torch.no_grad():
        assert torch.equal(logits(opened), logits_of(model, TOKENS))
    assert (opened.run_id, opened.step, opened.log, opened.commit, opened.tracked) == ("hf", 0, None, None, None)
    assert (opened.seq_len, opened.tokenizer) == (128, BYTES)
    assert [one.where for one in series(str(tmp_path / "hf"), uri)] == [str(tmp_path / "hf")]


def test_weights_are_rounded_to_bf16_and_the_routers_biases_are_not(run):
    folder, uri, model = run
    half = open_trained(str(folder), uri).model("bfloat16").state_dict()
    for name, tensor in model.state_dict().items():
        exact = tensor if name.endswith("correction_bias") else tensor.bfloat16()
        assert half[name].dtype == exact.dtype and torch.equal(half[name], exact), name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{folder}@15", "no committed checkpoint of step 15; there are checkpoints of step 10, 20"),
        ("my run@9", "no committed checkpoint of step 9; there are checkpoints of step 10, 20"),
        ("{folder}-none", "no run's folder (there is no log/ in it), and no Hugging Face model (no config.json)"),
        ("another", "has no run of that id or name"),
    ],
)
def test_what_is_not_there_is_told(run, name, told):
    folder, uri, _ = run
    with pytest.raises(ConfigError) as raised:
        open_trained(name.format(folder=folder), uri)
    assert told in str(raised.value)


def test_a_series_is_of_no_single_step(run):
    folder, uri, _ = run
    with pytest.raises(ConfigError, match="name it without @10"):
        series(f"{folder}@10", uri)


def test_many_steps_are_not_all_told(tmp_path):
    trained(tmp_path / "run", "llama", steps=range(10, 210, 10))
    with pytest.raises(ConfigError) as raised:
        open_trained(f"{tmp_path}/run@5", "")
    assert str(raised.value).endswith("of step 10, 20, ..., 120, 130, 140, 150, 160, 170, 180, 190, 200")


def test_damage_is_told(tmp_path):
    trained(tmp_path / "run", "llama")
    (shard,) = (tmp_path / "run" / "shards").rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedError, match="damaged"):
        open_trained(f"{tmp_path}/run", "").model()
    (manifest,) = (tmp_path / "run" / "manifests").iterdir()
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="damaged"):
        open_trained(f"{tmp_path}/run", "")


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_told_as_such(tmp_path, monkeypatch):
    trained(tmp_path / "run", "llama", steps=(10, 20, 30))
    opened = open_trained(f"{tmp_path}/run@10", "")
    log, commit = find_commit(f"{tmp_path}/run@20")
    for step in (10, 20):
        remove(f"{tmp_path}/run@{step}", force=False)
    with pytest.raises(StorageError, match=r"run@10: deleted while it was read.*checkpoints ls .*run\)"):
        opened.model()
    monkeypatch.setattr("jobs.export.find_commit", lambda *given: (log, commit))
    with pytest.raises(StorageError, match="run@20: deleted while it was read"):
        export("a run", str(tmp_path / "hf"), "float32")


def test_weights_that_are_not_finite_are_told(tmp_path):
    def poison(model) -> None:
        model.model.norm.weight.data[3] = float("nan")

    trained(tmp_path / "run", "llama", change=poison)
    with pytest.raises(StorageError, match=r"model\.norm\.weight has elements that are NaN or infinite"):
        open_trained(f"{tmp_path}/run", "").model()
