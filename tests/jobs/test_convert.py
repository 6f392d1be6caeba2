"""Converted models against the dense ones that they were made of, transformers' loading of them, and a run from one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from jobs.convert.clusters import equal_clusters
from jobs.convert.command import Asked, convert
from jobs.convert.target import Shape, mixture_of
from jobs.export import export
from jobs.import_ import import_model
from jobs.load import load
from jobs.trained import open_trained
from orchestrator.origin import find_origin
from tests.closeness import assert_close
from tests.jobs.test_export import TEXT, trained
from tests.workers import test_llama, test_llama_moe, test_moonlight
from workers.common.errors import ConfigError
from workers.config import LlamaConfig, LlamaMoeConfig, MoonlightConfig
from workers.models import logits_of

pytestmark = pytest.mark.numeric

DENSE = {
    "llama": test_llama.TINY,
    "llama of odd sizes": replace(
        test_llama.TINY, num_heads=3, num_kv_heads=1, head_dim=6, hidden_size=40, num_layers=1, intermediate_size=72
    ),
    "moonlight": replace(test_moonlight.TINY, num_dense_layers=2),
    "llama-moe": replace(test_llama_moe.TINY, num_dense_layers=2),
}
TOKENS = torch.tensor([list(TEXT.encode())])


def converted(folder, dense, shape: Shape, **asked) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Convert a dense model of random weights, and return both."""
    model = trained(folder / "dense", dense)
    convert(Asked(what=str(folder / "dense"), to=str(folder / "mixture"), shape=shape, **asked))
    return model, open_trained(str(folder / "mixture"), "").model("float32", "cpu")


@torch.no_grad()
def assert_same(mixture, dense) -> None:
    assert_close(logits_of(mixture, TOKENS), logits_of(dense, TOKENS), 4)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("experts", "shared", "dense_layers"), [(3, 0, 0), (2, 1, 0), (3, 0, 1)])
def test_parts_are_the_dense_model_where_all_are_chosen(tmp_path, name, experts, shared, dense_layers):
    if dense_layers == DENSE[name].num_layers:
        pytest.skip("one layer")
    shape = Shape(method="moefy", experts=experts, active=experts, shared=shared, dense_layers=dense_layers)
    dense, mixture = converted(tmp_path, DENSE[name], shape, sharpness=0.1)
    assert mixture.config.moe_intermediate_size * (experts + shared) == DENSE[name].intermediate_size
    assert_same(mixture, dense)


@pytest.mark.parametrize("text", ["", "LICENSE"])
def test_with_all_chosen_after_all_the_router_costs_no_more_than_its_sharpness(tmp_path, text):
    """Each gate is near 1 whoever is chosen: the error with all of them is proportional to the logits."""
    shape, far = Shape(method="moefy", experts=6, active=3), []
    for number, sharpness in enumerate((1e-3, 1e-2)):
        dense, mixture = converted(tmp_path / str(number), DENSE["llama"], shape, sharpness=sharpness, text=text)
        for block in mixture.blocks:
            block.mlp.gate.top_k, block.mlp.gate.scale = 6, 6.0
        with torch.no_grad():
            expected = logits_of(dense, TOKENS)
            far.append(((logits_of(mixture, TOKENS) - expected).norm() / expected.norm()).item())
    assert 0 < far[0] < 1e-3 and far[1] == pytest.approx(10 * far[0], rel=0.1)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("active", [1, 2, 5])
def test_copies_are_the_dense_model_whoever_is_chosen(tmp_path, name, active):
    shape = Shape(method="upcycle", experts=5, active=active)
    dense, mixture = converted(tmp_path, DENSE[name], shape)
    assert_same(mixture, dense)
    chosen = []
    handles = [block.mlp.gate.register_forward_hook(lambda *of: chosen.append(of[2][1])) for block in mixture.blocks]
    with torch.no_grad():
        logits_of(mixture, TOKENS)
    assert len(handles) == len(chosen) and all(len(one.unique()) > 2 for one in chosen), "a router that chooses"


@torch.no_grad()
def test_noise_sets_copies_apart_by_its_share(tmp_path):
    _, mixture = converted(tmp_path, DENSE["llama"], Shape(method="upcycle", experts=3), noise=0.25)
    dense = dict(open_trained(str(tmp_path / "dense"), "").model("float32", "cpu").named_parameters())
    for name in ("gate", "up", "down"):
        weight = dense[f"model.layers.1.mlp.{name}_proj.weight"]
        apart = getattr(mixture.blocks[1].mlp.experts, f"{name}_proj") - weight
        assert apart.square().mean().sqrt() / weight.square().mean().sqrt() == pytest.approx(0.25, rel=0.05)
        assert not torch.equal(apart[0], apart[1])


def test_experts_have_each_neuron_once_and_a_seed_makes_the_same_again(tmp_path):
    shape = Shape(method="moefy", experts=2, active=1, shared=1)
    found = []
    for number, seed in enumerate((7, 7, 8)):
        folder = tmp_path / str(number)
        dense, mixture = converted(folder, DENSE["llama"], shape, sharpness=0.1, seed=seed, text="LICENSE")
        for before, after in zip(dense.blocks, mixture.blocks, strict=True):
            experts, shared = after.mlp.experts, after.mlp.shared_experts
            for name in ("gate_proj", "up_proj"):
                rows = torch.cat([*getattr(experts, name), getattr(shared, name).weight])
                order = torch.cdist(rows, getattr(before.mlp, name).weight).argmin(1)
                assert sorted(order.tolist()) == list(range(48))
                assert torch.equal(rows, getattr(before.mlp, name).weight[order])
            columns = torch.cat([*experts.down_proj, shared.down_proj.weight], 1)
            assert torch.equal(columns, before.mlp.down_proj.weight[:, order]), "a neuron keeps its three parts"
        found.append(mixture.state_dict())
    same = [all(torch.equal(found[0][name], one[name]) for name in found[0]) for one in found[1:]]
    assert same == [True, False]


def test_the_fitted_router_chooses_better_than_another(tmp_path):
    """By the share of the best choice's output that is left; weights that were fitted to the wrong thing lose here."""
    text = "\n\n".join(f"{number} of the things that a router reads, {number * 7} in all" for number in range(400))
    (tmp_path / "text.txt").write_text(text)
    shape = Shape(method="moefy", experts=6, active=2)
    asked = {"sharpness": 0.1, "text": str(tmp_path / "text.txt")}
    _, mixture = converted(tmp_path, DENSE["llama"], shape, **asked)
    tokens = torch.tensor([list(text.encode()[:256])])
    block, seen = mixture.blocks[0], []
    block.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        logits_of(mixture, tokens)
        experts = block.mlp.experts
        stacks = zip(experts.gate_proj, experts.up_proj, experts.down_proj, strict=True)
        silu = torch.nn.functional.silu
        sizes = torch.stack([((silu(seen[0] @ g.T) * (seen[0] @ u.T)) @ d.T).norm(dim=1) for g, u, d in stacks], 1)
        chosen = block.mlp.gate(seen[0])[1]
    kept, best = sizes.gather(1, chosen).sum(), sizes.topk(2).values.sum()
    assert kept > sizes.mean(1).sum() * 2 * 1.1 and kept > 0.75 * best


@pytest.mark.parametrize(("points", "clusters"), [(6, 2), (60, 5), (12, 12), (7, 1)])
def test_clusters_are_equal_and_hold_each_point_once(points, clusters):
    found = equal_clusters(np.random.default_rng(0).standard_normal((points, 3)), clusters, 1)
    assert found.shape == (clusters, points // clusters) and sorted(found.ravel().tolist()) == list(range(points))
    assert np.array_equal(np.sort(found, 1), found)


def test_clusters_find_what_lies_together():
    random = np.random.default_rng(0)
    centres, truth = 10 * random.standard_normal((4, 8)), random.permutation(np.repeat(np.arange(4), 10))
    found = equal_clusters(centres[truth] + random.standard_normal((40, 8)), 4, 3)
    assert all(len(set(truth[one].tolist())) == 1 for one in found)
    assert equal_clusters(np.ones((8, 2)), 4, 0).shape == (4, 2), "points that are all the same"


@pytest.mark.parametrize("method", ["moefy", "upcycle"])
@pytest.mark.parametrize("name", ["llama", "moonlight"])
def test_transformers_computes_the_same_with_the_export(tmp_path, name, method):
    from transformers import AutoModelForCausalLM

    _, mixture = converted(tmp_path, DENSE[name], Shape(method=method, experts=3, active=2), sharpness=0.3)
    export(str(tmp_path / "mixture"), str(tmp_path / "hf"), "float32")
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    with torch.no_grad():
        assert_close(logits_of(mixture, TOKENS), loaded(TOKENS).logits, 2)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Made by raymuon of the dense model run-7 at step 10" in card and "3 experts" in card
    assert "| began with | run-7 at step 10" in card


def test_a_hugging_face_folder_becomes_one(folder_of, tmp_path):
    ids = {"bos_token_id": 5, "eos_token_id": [7, 9], "max_position_embeddings": 99}
    folder = folder_of("llama", ids)
    convert(Asked(what=str(folder), to=str(tmp_path / "mixture"), shape=Shape(method="upcycle", experts=2)))
    found, dense = (
        open_trained(str(tmp_path / "mixture"), ""),
        open_trained(import_model(str(folder), f"{tmp_path}/in"), ""),
    )
    assert_same(found.model("float32", "cpu"), dense.model("float32", "cpu"))
    assert (
        found.seq_len == 99 and found.ends == {0, 7, 9} and found.manifest.lineage.ancestors[0].imported == folder.name
    )
    export(str(tmp_path / "mixture"), str(tmp_path / "hf"), "bfloat16")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [7, 9]


WRONG = [
    (
        "llama",
        ["moefy", "--experts", "5"],
        "--experts 5: ",
        "cut into 5 parts of which the width is a multiple of 8; 2, 3, 6",
    ),
    ("llama", ["moefy", "--experts", "4", "--shared", "1"], "--experts 4 and --shared 1", "2, 3, 6 fit"),
    ("llama", ["moefy", "--experts", "3", "--active", "4"], "--active 4: a token visits 1 to 3", ""),
    ("llama", ["upcycle", "--experts", "3", "--active", "0"], "--active 0: a token visits 1 to 3", ""),
    ("llama", ["moefy", "--experts", "1"], "--experts 1: 2 is the least", ""),
    ("llama", ["moefy", "--experts", "2", "--shared", "-1"], "--shared -1: 0 is the least", ""),
    ("llama", ["upcycle", "--experts", "2", "--dense-layers", "2"], "--dense-layers 2: 0 to 1 of the 2 layers", ""),
    ("llama", ["moefy", "--experts", "2", "--sharpness", "0"], "must be a finite number greater than 0", ""),
    ("llama", ["upcycle", "--experts", "2", "--noise", "-1"], "must be a finite number of 0 or more", ""),
    ("llama", ["moefy", "--experts", "2", "--text", "nowhere.txt"], "nowhere.txt", ""),
    ("mixture", ["moefy", "--experts", "2"], "it is a mixture of experts already, in 1 of its 2 layers", ""),
    ("narrow", ["upcycle", "--experts", "2"], "its intermediate_size 44 is no multiple of 8", ""),
    ("odd", ["moefy", "--experts", "2"], "hidden_size must be a multiple of 8", ""),
]


@pytest.mark.parametrize(("name", "options", "told", "more"), WRONG)
def test_what_cannot_be_is_refused_with_nothing_written(tmp_path, name, options, told, more):
    sizes = {
        **DENSE,
        "mixture": test_moonlight.TINY,
        "narrow": replace(test_llama.TINY, intermediate_size=44),
        "odd": replace(test_llama.TINY, hidden_size=36),
    }
    trained(tmp_path / "dense", sizes[name])
    result = CliRunner().invoke(
        app, ["convert", options[0], str(tmp_path / "dense"), "--to", str(tmp_path / "to"), *options[1:]]
    )
    message = str(result.exception) + result.output
    assert told in message and more in message, message
    assert getattr(result.exception, "exit_code", 2) == 2 or isinstance(result.exception, SystemExit)
    assert result.exit_code != 0 and not (tmp_path / "to").exists()


def test_a_full_folder_and_a_failure_on_the_way(tmp_path, monkeypatch):
    trained(tmp_path / "dense", "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    asked = Asked(what=str(tmp_path / "dense"), to=str(tmp_path / "full"), shape=Shape(method="upcycle", experts=2))
    with pytest.raises(ConfigError, match="something is there already"):
        convert(asked)
    monkeypatch.setattr("jobs.first_checkpoint.write_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(replace(asked, to=str(tmp_path / "to")))
    assert not (tmp_path / "to").exists()


def test_there_is_no_optimizers_state_to_be_taken(tmp_path):
    converted(tmp_path, DENSE["llama"], shape := Shape(method="upcycle", experts=2))
    config = load("demo", [f"train.init={tmp_path}/mixture", "optim.name=muon"])
    config = replace(config, model=mixture_of(DENSE["llama"], shape, ""))
    assert find_origin(config).manifest.identity["data.tokenizer"] == ""
    with pytest.raises(ConfigError, match="has none, for it was imported or converted"):
        find_origin(replace(config, train=replace(config.train, init_state="all")))


def test_json_tells_the_sizes_and_the_losses(tmp_path):
    trained(tmp_path / "dense", "llama")
    options = ["--to", str(tmp_path / "to"), "--experts", "3", "--text", "LICENSE", "--json"]
    result = CliRunner().invoke(app, ["convert", "moefy", str(tmp_path / "dense"), *options])
    told = json.loads(result.stdout.splitlines()[-1])
    experts = 2 * 3 * 48 * 32
    assert told["parameters"] == told["dense_parameters"] + 2 * 3 * 32
    assert told["active_parameters"] == told["parameters"] - experts + experts // 3
    assert told["model"]["num_experts_per_token"] == 1 and told["method"] == "moefy"
    assert told["dense_loss"] == pytest.approx(np.log(256), rel=0.5) and told["loss"] > 0
    assert told["url"] == str(tmp_path / "to") and told["made_of"] == f"{tmp_path}/dense@10"


def test_the_mixtures_of_published_sizes():
    """OLMoE-like cuts of Llama 3.2 1B, by hand."""
    dense = test_llama.LLAMA_3_2_1B
    parts = mixture_of(dense, Shape(method="moefy", experts=16, active=4), "x")
    assert isinstance(parts, LlamaMoeConfig) and (parts.moe_intermediate_size, parts.routed_scaling_factor) == (
        512,
        4.0,
    )
    copies = mixture_of(dense, Shape(method="upcycle", experts=8), "x")
    assert (copies.moe_intermediate_size, copies.num_experts_per_token, copies.routed_scaling_factor) == (8192, 2, 1.0)
    assert {key: getattr(copies, key) for key in ("rope_theta", "norm_eps", "head_dim", "num_kv_heads")} == {
        key: getattr(dense, key) for key in ("rope_theta", "norm_eps", "head_dim", "num_kv_heads")
    }
    latent = mixture_of(MoonlightConfig(num_dense_layers=3, kv_lora_rank=24), Shape(method="moefy", experts=4), "x")
    assert isinstance(latent, MoonlightConfig) and latent.kv_lora_rank == 24 and latent.num_dense_layers == 0
    assert isinstance(dense, LlamaConfig)
