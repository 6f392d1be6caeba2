"""Which parameter goes where, and which matrices are in it."""

import pytest
import torch

from optim.routing import matrices_in, parameter_groups
from tests.workers import test_llama, test_llama_moe, test_moonlight
from workers.models import build_empty

MODELS = {"moonlight": test_moonlight.TINY, "llama": test_llama.TINY, "llama-moe": test_llama_moe.TINY}


@pytest.mark.parametrize("split", ["none", "fused", "heads"])
@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_parameter_is_in_one_group_and_its_matrices_tile_it(name, split):
    model = build_empty(MODELS[name])
    parts = model.matrix_parts(split)
    parameters = dict(model.named_parameters())
    assert parts.keys() <= parameters.keys() and bool(parts) == (
        split == "heads" or (name, split) == ("moonlight", "fused")
    )
    groups = parameter_groups(parameters.items(), "muon", model.tables(), parts)
    assert sorted(n for group in groups for n in group["names"]) == sorted(parameters)
    muon = next(group for group in groups if group["method"] == "muon")
    for parameter, matrices in zip(muon["params"], muon["matrices"], strict=True):
        assert sum(rows * columns for rows, columns in matrices) == parameter.numel()
    heads = len(next(m for n, m in zip(muon["names"], muon["matrices"], strict=True) if n.endswith("q_proj.weight")))
    assert heads == (MODELS[name].num_heads if split == "heads" else 1)


def test_matrices_in_a_parameter():
    assert matrices_in((4, 6)) == [(4, 6)] and matrices_in((2, 4, 6)) == [(4, 6), (4, 6)]
    assert matrices_in((2, 4, 6), (1, 3)) == [(1, 6), (3, 6), (1, 6), (3, 6)]
    with pytest.raises(ValueError, match="parts of 1, 2 rows do not make up 4"):
        matrices_in((4, 6), (1, 2))


def test_a_parameter_that_deepspeed_would_take_is_refused():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.use_muon = False
    with pytest.raises(ValueError, match="w has an attribute use_muon"):
        parameter_groups([("w", weight)], "muon", ())
