"""A mixture of sources through Ray: prepared by tasks, killed, and gone on with at another world size."""

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from jobs.load import load as load_config
from tests.e2e.conftest import RAYMUON, TINY, Place
from tests.e2e.test_resume import wait_for_step, workers_of
from tests.ledger import assert_every_sample_once, ledger
from workers.common.storage import Store
from workers.data.corpus import load

STEPS, BORDER = 40, 20
MIXED = """
data:
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
def mixed_place(make_place, texts):
    def make(name: str) -> Place:
        place = make_place(name)
        for source in ("web", "notes"):
            lines = [line for file in sorted(texts.glob("*.py")) for line in file.read_text().split("\n\n")]
            rows = [json.dumps({"text": f"{source}: {line}"}) for line in lines]
            (place.folder / f"{source}.jsonl").write_text("\n".join(rows))
        config = TINY.replace("data: {source: TEXTS}", MIXED.replace("TEXTS", str(texts)))
        (place.folder / "tiny.yaml").write_text(config.replace("steps: 120", f"steps: {STEPS}"))
        return place

    return make


def told_by(place: Place, *arguments: str) -> object:
    done = subprocess.check_output([RAYMUON, *arguments, "--json"], cwd=place.folder, env=place.environment())
    return json.loads(done.splitlines()[-1])


def test_a_mixture_that_changes_is_the_same_killed_and_at_another_world_size(mixed_place):
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
    piece = told[0]["pieces"][0]
    if piece["file"].endswith(".py"):
        assert piece["text"].rstrip("\0") in Path(piece["file"]).read_text()


def test_a_source_that_has_changed_is_refused_by_its_name(mixed_place):
    place = mixed_place("changed")
    place.train(f"train.steps={BORDER}")
    with (place.folder / "web.jsonl").open("a") as file:
        file.write('\n{"text": "something new"}')
    refused = place.run("--resume", "tiny", code=2)
    assert "data.web" in refused.stderr and "data.code" not in refused.stderr
