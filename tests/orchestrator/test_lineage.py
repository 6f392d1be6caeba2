"""What manifests tell of where a model comes from: over runs that begin with one another, resumes, replays, imports."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from jobs.checkpoints import show
from jobs.cli import app
from jobs.export import export, export_series
from jobs.import_ import import_model
from optim.config import OptimConfig
from orchestrator.attempt import lineage_of
from orchestrator.config import task_of
from orchestrator.log.run_log import RunLog
from orchestrator.record.provenance import code_of
from tests.closeness import ADAMW_EPS
from tests.jobs.test_export import trained
from tests.leading import Lead, config_of
from tests.processes import ProcessCluster
from workers.checkpoint.lineage import Lineage, descend
from workers.checkpoint.manifest import FORMAT, Manifest
from workers.common.source import training_code
from workers.common.storage import Store
from workers.recipe import StageConfig

KEYS = {"run_id", "attempt", "generation", "step", "world_size", "identity", "counters", "shapes", "shards", "format"}
"""Of a manifest: the version before takes no others."""


def run(folder, steps: int, init: str = "", optim: str = "muon", stages: tuple[StageConfig, ...] = ()) -> Manifest:
    """Train in a folder, and return the manifest of the newest checkpoint."""
    one = {"min_workers": 1, "max_workers": 1}
    config = config_of(
        folder,
        train={"steps": 0 if stages else steps, "init": init, "stages": stages},
        scaling=one,
        checkpoint={"every": 2, "keep_last": 0},
        optim=OptimConfig(name=optim, lr=1e-3, eps=ADAMW_EPS),
    )
    with Lead(config, ProcessCluster({"a": 1}), folder) as lead:
        lead.wait()
    return RunLog(Store(f"{folder}/run")).manifest()


def sha256_of(folder, step: int) -> str:
    """Return the hash of a manifest's file."""
    return hashlib.sha256(
        (folder / "run" / RunLog(Store(f"{folder}/run")).find(step).manifest).read_bytes()
    ).hexdigest()


def test_a_chain_of_runs_is_told_by_its_last_manifest(tmp_path):
    """A run, another with its weights, a third with those: resumed, exported, and with the first ones gone."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    begun = run(first, 4, stages=(StageConfig(name="broad", steps=2), StageConfig(name="long", steps=2)))
    assert begun.lineage == Lineage(code=code_of(), stage="long") and code_of()["training"] == training_code()
    tuned = run(second, 2, f"{first}/run@2", "adamw")
    run(third, 2, f"{second}/run")
    hashes = sha256_of(second, 2), sha256_of(first, 2)
    for folder in (first, second):
        shutil.rmtree(folder)
    again = run(third, 4, f"{second}/run")  # Its origin is gone, and not needed.
    log = RunLog(Store(f"{third}/run"))
    assert [commit.step for commit in log.commits] == [2, 4] and again.attempt == 2
    for step in (2, 4):
        lineage = log.manifest(step).lineage
        near, far = lineage.ancestors
        assert lineage.complete and lineage.code == near.code == far.code == code_of()
        assert (near.url, far.url) == (f"{second}/run", f"{first}/run")
        assert (near.step, far.step, near.optimizer, far.optimizer) == (2, 2, "adamw", "muon")
        assert (near.sha256, far.sha256) == hashes and (near.stage, far.stage) == ("", "broad")
        assert near.tokens == tuned.counters["tokens"] and near.data == far.data == begun.identity["data"]

    told = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["checkpoints", "show", f"{third}/run"]).output
    assert f"began with: run at step 2, adamw, {near.tokens:,} tokens, SHA-256 of the manifest {hashes[0]}" in told
    assert (
        f"and that with: run at step 2, stage broad, muon, {far.tokens:,} tokens, SHA-256 of the manifest {hashes[1]}"
        in told
    )
    assert f"in {first}/run" in told and f"hash of the training code {training_code()}" in told
    told = CliRunner().invoke(app, ["checkpoints", "show", f"{third}/run", "--json"]).output
    assert json.loads(told)["lineage"] == lineage.encode()
    exported = export_series(f"{third}/run", str(tmp_path / "hf"), "bfloat16")
    assert [one.began_with for one in exported] == ["run at step 2"] * 2
    card = (tmp_path / "hf" / "step-00000004" / "README.md").read_text()
    assert "Trained with raymuon from the weights of run at step 2." in card
    assert all(text in card for text in (*hashes, training_code(), begun.identity["data"]))
    assert str(tmp_path) not in card, "where somebody has trained is nobody's affair"


def test_readers_of_the_version_before_find_what_they_know(tmp_path):
    """They take the keys that they have, and of the identity what they compare."""
    trained(tmp_path, "llama")
    log = RunLog(Store(str(tmp_path)))
    manifest = log.manifest()
    parent = replace(manifest, sha256="f" * 64)
    stored = json.loads(replace(manifest, lineage=descend(code_of(), parent, "there")).encode())
    assert stored.keys() == KEYS and stored["format"] == FORMAT
    assert {key: value for key, value in stored["identity"].items() if key != "lineage"} == manifest.identity


@pytest.mark.parametrize("stored", [None, {"code": {"training": "0"}, "later": 1}, {"code": 7}, "later"])
def test_a_manifest_of_another_version_is_read(tmp_path, stored):
    trained(tmp_path, "llama")
    manifest = RunLog(Store(str(tmp_path))).manifest()
    fields = json.loads(manifest.encode())
    if stored is not None:
        fields["identity"]["lineage"] = stored
    data = json.dumps(fields).encode()
    (tmp_path / "m.json").write_bytes(data)
    found = Manifest.read(Store(str(tmp_path)), "m.json", hashlib.sha256(data).hexdigest())
    known = isinstance(stored, dict) and isinstance(stored["code"], dict)
    assert found.lineage == (Lineage(code={"training": "0"}) if known else None)
    assert found == replace(manifest, lineage=found.lineage) and "lineage" not in found.identity


def test_what_older_versions_have_not_put_down_is_told(tmp_path):
    trained(tmp_path / "old", "llama")
    old = RunLog(Store(f"{tmp_path}/old")).manifest()
    assert old.lineage is None
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["checkpoints", "show", f"{tmp_path}/old"]).output
    assert "comes from: not recorded: an older raymuon has written it" in done
    assert show(f"{tmp_path}/old")["lineage"] is None
    lineage = descend({}, old, "there")
    assert not lineage.complete and lineage.ancestors[0].sha256 == old.sha256 != ""
    task = task_of(config_of(tmp_path), (), "here", 2, old)
    assert lineage_of(task, 3) == Lineage(code=code_of(), complete=False), "its own run's older checkpoint"
    replayed = lineage_of(replace(task, manifest_url="there"), 3)
    assert [one.run_id for one in replayed.ancestors] == ["run-7"] and not replayed.complete


def test_an_import_is_where_a_chain_ends(tmp_path):
    trained(tmp_path / "run", "llama")
    export(str(tmp_path / "run"), str(tmp_path / "original"), "float32")
    imported = RunLog(Store(import_model(str(tmp_path / "original"), str(tmp_path / "imported")))).manifest()
    assert imported.lineage == Lineage(code=code_of())
    lineage = descend(code_of(), imported, "there")
    assert lineage.complete and [one.imported for one in lineage.ancestors] == ["original"]
    before = descend(code_of(), replace(imported, lineage=None), "there")
    assert before.complete, "nothing was before it, whoever has imported it"
