"""Folders of Hugging Face models, imported and compared with transformers' loading of them."""

import pytest
import torch

from jobs.checkpoints import open_checkpoint
from jobs.import_ import import_model
from jobs.trained import model_of
from tests.jobs.test_export import TEXT
from workers.common.errors import ConfigError
from workers.models import build, logits_of

KINDS = {"llama": "llama", "deepseek_v3": "moonlight", "glm4_moe": "llama-moe"}
"""Our name of each `model_type`."""
TOKENS = torch.tensor([list(TEXT.encode())])
GONE = object()
"""Of a key that is taken out."""


def imported(folder):
    """Import a folder and build the model of the checkpoint."""
    reader = open_checkpoint(import_model(str(folder), f"{folder}-imported"))
    model = build(model_of(reader.manifest)).eval()
    found = {key: reader.tensor(kind, key) for kind in reader.kinds for key in reader.names(kind)}
    model.load_state_dict({key: torch.from_numpy(tensor.copy()) for key, tensor in found.items()})
    return model


def difference(folder) -> float:
    """Return by how much the logits differ from those of transformers' loading of the folder."""
    from transformers import AutoModelForCausalLM

    model = imported(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = logits_of(model, TOKENS), loaded(TOKENS).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def refused(folder) -> str:
    """Return why a folder is refused, with nothing written."""
    to = folder.parent / "refused"
    with pytest.raises(ConfigError) as raised:
        import_model(str(folder), str(to))
    assert not to.exists() and raised.value.exit_code == 2
    return str(raised.value)
