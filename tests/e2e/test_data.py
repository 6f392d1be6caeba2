"""A mixture of sources through Ray, with a tokenizer of its own.

It is prepared by tasks, killed, gone on with at another world size, replayed, and exported with the tokenizer.
"""

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from jobs.load import load as load_config
from jobs.screen import Screen
from jobs.tokenizer import train_tokenizer
from jobs.trained import model_of
from orchestrator.log.run_log import find_commit
from tests.e2e.conftest import RAYMUON, TINY, Place
from tests.e2e.test_resume import wait_for_step, workers_of
from tests.ledger import assert_every_sample_once, ledger
from workers.checkpoint.manifest import BUFFER, WEIGHT, Manifest
from workers.checkpoint.shards import CheckpointReader
from workers.common.storage import Store
from workers.data.config import DataConfig
from workers.data.corpus import load
from workers.data.tokenizer_files import open_tokenizer
from workers.models import build, logits_of

STEPS, BORDER, VOCAB = 40, 20, 512
MIXED = """
data:
  tokenizer: TOKENIZER
  deduplicate: true
  ledger: ledger
  sources:
    - {name: code, urls: [TEXTS/*.py], weight: 0.7}
    - {name: web, urls: [web.jsonl], weight: 0.2}
    - {name: notes, urls: [notes.jsonl], weight: 0.1}
  mixture:
    - {step: 20, weights: {code: 0.25, web: 0.75}}
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, texts) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer") / "made")
    train_tokenizer(str(texts), VOCAB, folder, "text", 0, Screen(quiet=True))
    return folder


@pytest.fixture(scope="module")
def mixed_place(make_place, texts, tokenizer):
    def make(name: str) -> Place:
        place = make_place(name)
        for source in ("web", "notes"):
            lines = [line for file in sorted(texts.glob("*.py")) for line in file.read_text().split("\n\n")]
            rows = [json.dumps({"text": f"{source}: {line}"}) for line in lines]
            (place.folder / f"{source}.jsonl").write_text("\n".join(rows))
        config = TINY.replace("data: {source: TEXTS}", MIXED.replace("TEXTS", str(texts)))
        config = config.replace("TOKENIZER", tokenizer).replace("model: {", f"model: {{vocab_size: {VOCAB}, ")
        (place.folder / "tiny.yaml").write_text(config.replace("steps: 120", f"steps: {STEPS}"))
        return place

    return make


def told_by(place: Place, *arguments: str) -> object:
    done = subprocess.check_output([RAYMUON, *arguments, "--json"], cwd=place.folder, env=place.environment())
    return json.loads(done.splitlines()[-1])


def test_a_mixture_that_changes_is_the_same_killed_and_at_another_world_size(mixed_place, tokenizer):
    calm, place = mixed_place("calm"), mixed_place("killed")
    whole = calm.train()
    prepared = told_by(place, "prepare", "tiny.yaml", "--address", place.address)
    assert [one["name"] for one in prepared] == ["code", "web", "notes"]
    driver = place.start()
    wait_for_step(place, BORDER - 3, attempt=1)
    for process in [psutil.Process(driver.pid), *workers_of(place)]:
        process.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    result = place.train("--resume", "auto", "scaling.min_workers=1", "scaling.max_workers=1")
    assert result["world_size"] == 1 and result["steps"] == STEPS
    assert result["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-3)
    for source in ("code", "web", "notes"):
        here, there = (
            one.history(run["run_id"], f"val_loss/{source}") for one, run in ((place, result), (calm, whole))
        )
        assert [step for step, _ in here] == [step for step, _ in there] == [0, 30, STEPS]
        assert dict(here)[STEPS] == pytest.approx(dict(there)[STEPS], rel=2e-3)

    config = load_config(str(place.folder / "tiny.yaml"), [])
    corpora = tuple(load(Store(one["url"]), one["name"]) for one in prepared)
    assert [corpus.content_hash for corpus in corpora] == [
        one["content_hash"] for one in told_by(calm, "prepare", "tiny.yaml")
    ]
    assert_every_sample_once(place.folder / "ledger", config.train, config.seed, corpora, config.data)
    uri = f"sqlite:///{place.folder}/runs/mlflow.db"
    for step in (1, BORDER - 1, BORDER, STEPS):
        told = told_by(place, "data", "at", result["run_id"], str(step), "--tracking-uri", uri)
        lines = [line for line in ledger(place.folder / "ledger") if line["step"] == step]
        newest = max((line["attempt"], line["generation"]) for line in lines)
        by_slot = {line["slot"]: line for line in lines if (line["attempt"], line["generation"]) == newest}
        turns = [by_slot[slot] for slot in sorted(by_slot)]
        drawn = [pair for one in turns for pair in zip(one["sources"], one["samples"], strict=True)]
        assert [(one["source"], one["sample"]) for one in told] == drawn
        if step >= BORDER:
            assert {source for source, _ in drawn} == {"code", "web"}
    pieces = [piece for one in told for piece in one["pieces"] if piece["file"].endswith(".py")]
    assert pieces and all(piece["text"] in Path(piece["file"]).read_text() for piece in pieces)

    folder = f"{place.folder}/runs/checkpoints/{result['run_id']}"
    replayed = told_by(place, "replay", folder, "--steps", f"{BORDER + 11}:{STEPS}", *joined(place))
    assert replayed["verdict"] != "different" and replayed["compared"] > 0
    told_by(place, "export", folder, "--to", f"{place.folder}/exported")
    assert_exported(place.folder / "exported", folder, tokenizer)

    with (place.folder / "web.jsonl").open("a") as file:
        file.write('\n{"text": "something new"}')
    refused = place.run("--resume", "tiny", f"train.steps={STEPS + 1}", code=2)
    assert "data.web" in refused.stderr and "data.code" not in refused.stderr


def joined(place: Place) -> list[str]:
    return ["--address", place.address, "--tracking-uri", f"sqlite:///{place.folder}/runs/mlflow.db"]


def assert_exported(exported: Path, run: str, tokenizer: str) -> None:
    """Its tokenizer gives the ids of the one that it was trained with, and it writes token by token what ours does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    ours = open_tokenizer(DataConfig(tokenizer=tokenizer))
    text = "def naïve(x):\n    return '日本' * x  # ☃\n"
    ids = loaded(text)["input_ids"]
    assert ids == ours.encode([text.encode()])[0].tolist() and loaded.decode(ids) == text
    assert (loaded.eos_token_id, model.config.eos_token_id) == (ours.end, ours.end)
    written = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0].tolist()
    log, commit = find_commit(run)
    manifest = Manifest.read(log.store, commit.manifest, commit.sha256)
    trained, reader = build(model_of(manifest)).eval(), CheckpointReader(log.store, manifest)
    state = {name: torch.from_numpy(reader.tensor(WEIGHT, name)) for name in reader.names(WEIGHT)}
    state |= {name: torch.from_numpy(reader.tensor(BUFFER, name)) for name in reader.names(BUFFER)}
    trained.load_state_dict(state)
    with torch.no_grad():
        while len(ids) < len(written):
            ids.append(int(logits_of(trained, torch.tensor([ids]))[0, -1].argmax()))
    assert ids == written
