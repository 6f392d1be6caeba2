"""Fixtures of several tests of jobs."""

import itertools
import json
import shutil

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return a folder of each architecture, with every key that transformers writes."""
    from transformers import AutoModelForCausalLM

    from jobs.export import export
    from tests.jobs.folders import KINDS
    from tests.jobs.test_export import trained

    root = tmp_path_factory.mktemp("exported")
    for kind, name in KINDS.items():
        trained(root / f"{kind}-run", name)
        export(str(root / f"{kind}-run"), str(root / f"{kind}-hf"), "float32")
        AutoModelForCausalLM.from_pretrained(root / f"{kind}-hf").save_pretrained(root / kind)
    return root


@pytest.fixture
def folder_of(exported, tmp_path):
    """Return what makes a folder of an architecture with other keys in its config and other tensors."""
    from safetensors.torch import load_file, save_file

    from tests.jobs.folders import GONE

    numbers = itertools.count()

    def make(kind: str, changes: dict | None = None, tensors=lambda tensors: tensors):
        folder = tmp_path / f"{kind}-{next(numbers)}"
        shutil.copytree(exported / kind, folder)
        config = json.loads((folder / "config.json").read_text()) | (changes or {})
        config = {key: value for key, value in config.items() if value is not GONE}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        return folder

    return make
