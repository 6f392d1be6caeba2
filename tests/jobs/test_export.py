"""Exported models, loaded by transformers."""

import html
import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from jobs.export import export, export_series, recorded, register, registry
from jobs.hugging_face import refuse_unloadable
from jobs.stack.seaweed import BUCKET, s3_environment, seaweedfs
from jobs.trained import model_of
from orchestrator.log.run_log import RunLog
from tests.closeness import assert_close
from tests.workers import test_llama, test_llama_moe, test_moonlight
from workers.checkpoint.manifest import BUFFER, WEIGHT, Manifest, TensorSlice, place_of
from workers.checkpoint.shards import write_shard
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.config import ModelConfig
from workers.models import build, logits_of

MODELS = {"moonlight": test_moonlight.TINY, "llama": test_llama.TINY, "llama-moe": test_llama_moe.TINY}
TEXT = "def naïve(x):\n    return '日本' * x  # ☃\n"


def trained(
    folder, model: str | ModelConfig, steps=(10,), change=lambda model: None, run_id: str = "run-7", **known
) -> torch.nn.Module:
    """Commit checkpoints of a model whose every tensor is random, router biases too; `change` has the last word.

    What else is `known` of the run goes into its identity.
    """
    config = MODELS[model] if isinstance(model, str) else model
    torch.manual_seed(0)
    model = build(config).eval()
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 0.1)
    for norm, gain in model.named_parameters():
        if gain.dim() == 1:
            assert "norm" in norm
            gain.data = 1 + 0.1 * torch.randn(gain.shape)
    change(model)
    parameters = {key: tensor.detach().numpy() for key, tensor in model.named_parameters()}
    buffers = {key: tensor.numpy() for key, tensor in model.named_buffers() if key in model.state_dict()}
    log = RunLog(Store(str(folder)))
    log.take_over({})
    identity = {
        "model": asdict(config),
        "optim.name": "muon",
        "data": "d" * 64,
        "train.seq_len": 128,
        "train.global_batch": 8,
        **known,
    }
    shapes = {key: list(array.shape) for key, array in {**parameters, **buffers}.items()}
    for step in steps:
        flat = {TensorSlice(WEIGHT, key, 0, array.size): array.ravel() for key, array in parameters.items()}
        flat |= {
            TensorSlice("momentum_buffer", key, 0, array.size): np.zeros(array.size, "f4")
            for key, array in parameters.items()
        }
        flat |= {TensorSlice(BUFFER, key, 0, array.size): array.ravel() for key, array in buffers.items()}
        shard = write_shard(log.store, place_of(step, 1, 1), 0, flat)
        log.commit(
            Manifest(run_id, 1, 1, step, 1, identity, {"step": step, "tokens": 12345}, shapes, (shard,)),
            {"val_loss": 1.2345},
        )
    return model


@pytest.mark.numeric
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits(tmp_path, name, shard_bytes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = trained(tmp_path / "run", name, **{"train.growth": [[5, 16], [11, 32]]})
    done = export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32", shard_bytes)
    assert ("model.safetensors.index.json" in done.files) == (shard_bytes == 20_000)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == list(TEXT.encode()) and tokenizer.decode(tokens[0]) == TEXT
    with torch.no_grad():
        assert_close(logits_of(model, tokens), loaded(tokens).logits, MODELS[name].num_layers)
    written = loaded.generate(tokens, max_new_tokens=8, do_sample=False)
    assert written.shape[1] > tokens.shape[1]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| step | 10 |" in card and "12,345" in card and "1.2345" in card and "run-7" in card
    assert "| global batch | 8 sequences, 16 from step 5 on |" in card


def give_latents(rms: float):
    """Return what scales the compressed keys and values of every layer to this root mean square."""

    def change(model) -> None:
        tokens = torch.tensor([list(TEXT.encode())])
        for layer in model.model.layers:
            seen = []
            hook = layer.self_attn.kv_a_layernorm.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
            model(tokens)
            hook.remove()
            latents = layer.self_attn.kv_a_proj_with_mqa.weight.data[: MODELS["moonlight"].kv_lora_rank]
            latents *= rms / seen[0].square().mean().sqrt()

    return change


@pytest.mark.numeric
@pytest.mark.parametrize("rms", [0.006, 0.02, 0.1, 0.5, 2.0])
def test_small_latents_give_the_same_logits(tmp_path, rms):
    """With 1e-5 in the latents' norm, where transformers has 1e-6, they differ at 0.006 by 0.2 of the largest logit."""
    from transformers import AutoModelForCausalLM

    model = trained(tmp_path / "run", "moonlight", change=give_latents(rms))
    export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    tokens = torch.tensor([list(TEXT.encode())])
    with torch.no_grad():
        theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits, logits_of(model, tokens)
    assert_close(ours, theirs, MODELS["moonlight"].num_layers)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_half_as_large_and_the_router_bias_stays_whole(tmp_path, name):
    from safetensors import safe_open

    trained(tmp_path / "run", name)
    whole = export(str(tmp_path / "run"), str(tmp_path / "fp32"), "float32")
    half = export(str(tmp_path / "run"), str(tmp_path / "bf16"), "bfloat16")
    assert half.bytes < 0.6 * whole.bytes
    with safe_open(tmp_path / "bf16" / "model.safetensors", "pt") as file:
        kinds = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    bias = {key for key, kind in kinds.items() if kind == torch.float32}
    assert all(key.endswith("correction_bias") for key in bias) and bool(bias) == (name != "llama")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_series_and_what_is_refused(tmp_path):
    trained(tmp_path / "run", "llama", steps=(10, 20))
    series = export_series(str(tmp_path / "run"), str(tmp_path / "series"), "bfloat16")
    assert [one.step for one in series] == [10, 20]
    assert sorted(path.name for path in (tmp_path / "series").iterdir()) == ["step-00000010", "step-00000020"]
    with pytest.raises(ConfigError, match="something is there already"):
        export(str(tmp_path / "run"), str(tmp_path / "series"), "bfloat16")
    with pytest.raises(ConfigError, match="no committed checkpoint of step 15"):
        export(f"{tmp_path}/run@15", str(tmp_path / "other"), "bfloat16")
    assert not (tmp_path / "other").exists()


def test_the_names_are_deepseeks(tmp_path):
    from safetensors.numpy import load_file

    model = trained(tmp_path / "run", "moonlight")
    export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    stack = model.model.layers[1].mlp.experts.up_proj.detach().numpy()
    for expert in range(replace(test_moonlight.TINY).num_experts):
        assert np.array_equal(tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"], stack[expert])
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in tensors


def test_export_to_s3_is_the_same(tmp_path):
    trained(tmp_path / "run", "llama")
    here = export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32", 20_000)
    (tmp_path / "served").mkdir()
    with seaweedfs(tmp_path / "served") as endpoint:
        os.environ.update(s3_environment())
        there = export(str(tmp_path / "run"), f"s3://{BUCKET}/hf", "float32", 20_000, endpoint)
        store = Store(f"s3://{BUCKET}/hf", endpoint)
        assert there.files == here.files and there.bytes == here.bytes
        assert [f for f in here.files if store.read(f) != (tmp_path / "hf" / f).read_bytes()] == []


def test_a_series_becomes_versions_in_the_order_of_steps(tmp_path):
    """Whatever the order of the commits, as after a run has gone back; each found by its step, the last as newest."""
    import mlflow
    from transformers import AutoModelForCausalLM

    trained(tmp_path / "run", "llama", steps=(10, 30, 20))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    exported = export_series(str(tmp_path / "run"), str(tmp_path / "hf"), "float32", evaluated={20: {"arc/acc": 0.25}})
    assert [one.step for one in exported] == [10, 30, 20]
    tracking = registry("tiny", str(tmp_path), uri)
    with pytest.raises(ConfigError, match="--register 'a/b': Invalid model name 'a/b'"):
        registry("a/b", str(tmp_path), uri)
    assert not tracking.client.search_registered_models(), "asking makes nothing"
    assert register(exported, "tiny", tracking) == ["1", "3", "2"]
    client = mlflow.MlflowClient(uri)
    aliases = {"step-10": "1", "step-20": "2", "step-30": "3", "newest": "3"}
    assert {alias: str(version) for alias, version in client.get_registered_model("tiny").aliases.items()} == aliases
    second = client.get_model_version("tiny", "2")
    told = {"raymuon.step": "20", "raymuon.run_id": "run-7", "val_loss": "1.2345"}
    assert second.tags == {**told, "arc/acc": "0.25"} and second.source == f"{tmp_path}/hf/step-00000020"
    AutoModelForCausalLM.from_pretrained(client.get_model_version_download_uri("tiny", "2"))
    assert register(exported[:1], "tiny", tracking) == ["4"], "one alone is the newest of nothing"
    staged = [replace(one, stage=stage) for one, stage in zip(exported, ("a.b", "latest", "a.b"), strict=True)]
    assert register(staged, "tiny", tracking) == ["5", "7", "6"]
    aliases = {"step-10": "5", "step-20": "6", "step-30": "7", "newest": "7", "a-b": "6", "stage-latest": "7"}
    assert client.get_model_version_by_alias("tiny", "a-b").tags["raymuon.stage"] == "a.b"
    assert {alias: str(version) for alias, version in client.get_registered_model("tiny").aliases.items()} == aliases
    (tmp_path / "mlflow.db").unlink()
    with pytest.raises(StorageError, match=r"0 of 3 registered as tiny, from step 10 on not; .* is gone"):
        register(exported, "tiny", tracking)


def test_a_card_tells_what_evaluations_have_found_at_its_step(tmp_path):
    import mlflow

    trained(tmp_path / "run", "llama", steps=(10, 20))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert recorded(str(tmp_path / "run"), uri, pytest.fail) == {} and not (tmp_path / "mlflow.db").exists()
    client = mlflow.MlflowClient(uri)
    assert recorded(str(tmp_path / "run"), uri, pytest.fail) == {}, "it knows no such run"
    run_id = client.create_run("0").info.run_id
    (tmp_path / "run").rename(tmp_path / run_id)
    for name, step, value in (("eval/arc/acc", 20, 0.25), ("eval/arc/acc_stderr", 20, 0.02), ("eval/arc/acc", 10, 0.5)):
        client.log_metric(run_id, name, value, step=step)
    client.log_metric(run_id, "loss/train", 3.0, step=20)
    evaluated = recorded(str(tmp_path / run_id), uri, pytest.fail)
    assert evaluated == {10: {"arc/acc": 0.5}, 20: {"arc/acc": 0.25, "arc/acc_stderr": 0.02}}
    for one in export_series(str(tmp_path / run_id), str(tmp_path / "hf"), "bfloat16", evaluated=evaluated):
        card = (tmp_path / "hf" / f"step-{one.step:08d}" / "README.md").read_text()
        assert {10: "| arc/acc | 0.5000 |", 20: "| arc/acc | 0.2500 ± 0.0200 |"}[one.step] in card
        assert one.results == evaluated[one.step] and "stderr" not in card
    warned = []
    assert recorded(str(tmp_path / run_id), "http://127.0.0.1:9", warned.append) == {}
    assert "the card has no results of evaluations: " in warned[0]


def test_names_are_no_markdown_in_a_card(tmp_path):
    from markdown_it import MarkdownIt

    name = r"a_*b*|<b>`c` [x](http:y) ~~d~~ _e_ f_g &lt; \\ h"
    trained(tmp_path / "run", "llama", run_id=name)
    export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32", evaluated={10: {name: 0.5}})
    text = (tmp_path / "hf" / "README.md").read_text().split("---\n", 2)[2]
    shown = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert shown.count(html.escape(name, quote=False)) == 3, "heading, run, task"


ODD = {
    "llama": [
        *({"num_heads": heads, "num_kv_heads": heads} for heads in (1, 3, 5, 16)),
        {"num_heads": 6, "num_kv_heads": 2},
        {"num_heads": 3, "num_kv_heads": 1, "hidden_size": 33},
        {"num_heads": 64, "num_kv_heads": 64, "head_dim": 2},
        {"head_dim": 64},
        *({"init_std": std} for std in (1, 1.0, 1.5)),
        {"norm_eps": 1, "rope_theta": 10},
        {"vocab_size": 257, "intermediate_size": 7, "num_layers": 1},
    ],
    "moonlight": [
        {"num_experts": 1, "num_experts_per_token": 1},
        {"num_experts": 1, "num_experts_per_token": 1, "num_dense_layers": 2},
        {"num_experts": 2, "num_experts_per_token": 1},
        {"num_experts": 3, "num_experts_per_token": 3},
        {"num_heads": 3},
        {"num_dense_layers": 0},
        {"num_dense_layers": 2, "hidden_size": 33, "moe_intermediate_size": 90},
        {"num_shared_experts": 0},
        {"init_std": 1.5, "routed_scaling_factor": 1, "norm_eps": 1, "rope_theta": 10},
        {"kv_lora_rank": 1, "qk_rope_head_dim": 2, "qk_nope_head_dim": 5, "v_head_dim": 3},
        {"vocab_size": 300, "intermediate_size": 7, "num_layers": 1, "num_dense_layers": 0},
    ],
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in ODD for change in ODD[name]])
def test_what_transformers_cannot_load_is_told_before_anything_is_written(tmp_path, monkeypatch, name, change):
    """The oracle is transformers: a model is refused where, and only where, it does not come out of there the same."""
    from transformers import AutoModelForCausalLM

    model = trained(tmp_path / "run", replace(MODELS[name], **change))
    try:
        export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
        told = ""
    except ConfigError as error:
        told = str(error)
        assert not (tmp_path / "hf").exists()
        monkeypatch.setattr("jobs.export.refuse_unloadable", lambda model: None)
        export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    tokens = torch.tensor([list(TEXT.encode())])
    try:
        with torch.no_grad():
            loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
            theirs, ours = loaded(tokens).logits, logits_of(model, tokens)
        whole = not info["missing_keys"] and not info["unexpected_keys"]
        loads = whole and ((theirs - ours).abs().max() / theirs.abs().max()).item() < 1e-4
    except Exception:
        loads = False
    assert loads == (not told), told


def test_why_transformers_cannot_load_it():
    for name, change, told in (
        ("llama", {"num_heads": 6}, "its hidden_size (32) divides by num_heads (6)"),
        ("llama", {"init_std": 1.5}, "its init_std (1.5) is 1 or less (a run from it, train.init, may have another)"),
        ("moonlight", {"num_experts": 1, "num_experts_per_token": 1}, "its num_experts is 2 or more"),
    ):
        with pytest.raises(ConfigError) as raised:
            refuse_unloadable(replace(MODELS[name], **change))
        assert str(raised.value) == f"transformers loads a {name} only where {told}"


def test_a_vocabulary_that_is_larger_than_bytes_has_their_tokenizer(tmp_path):
    """A run's tokens are bytes, whatever the size of its vocabulary."""
    from transformers import AutoTokenizer

    trained(tmp_path / "run", replace(MODELS["llama"], vocab_size=300))
    export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(TEXT)["input_ids"] == list(TEXT.encode())
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "hf" / name).read_text())
        assert (said["bos_token_id"], said["eos_token_id"], said.get("pad_token_id")) == (0, 0, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(tmp_path, value):
    def poison(model) -> None:
        model.model.norm.weight.data[3] = value

    trained(tmp_path / "run", "llama", change=poison)
    with pytest.raises(StorageError, match=r"step 10: model\.norm\.weight has elements that are NaN or infinite"):
        export(str(tmp_path / "run"), str(tmp_path / "hf"), "bfloat16")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("failing", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("error", [StorageError, KeyboardInterrupt])
def test_what_does_not_come_to_its_end_leaves_nothing(tmp_path, monkeypatch, failing, error):
    def put(store, path: str, data: bytes, real=Store.put) -> None:
        if path == failing:
            (tmp_path / "hf").mkdir(exist_ok=True)
            raise error
        real(store, path, data)

    trained(tmp_path / "run", "llama")
    monkeypatch.setattr(Store, "put", put)
    with pytest.raises(error):
        export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("uri", "error", "told"),
    [
        ("http://127.0.0.1:9", ConfigError, "takes no folder of one machine; name a place that all reach"),
        ("postgresql://127.0.0.1:9/none", StorageError, "tracking.uri=postgresql"),
    ],
)
def test_what_cannot_be_registered_is_told_before_anything_is_written(tmp_path, uri, error, told):
    trained(tmp_path / "run", "llama")
    options = ("--to", f"{tmp_path}/hf", "--register", "ok", "--tracking-uri", uri)
    found = CliRunner().invoke(app, ["export", f"{tmp_path}/run", *options]).exception
    assert isinstance(found, error) and told in str(found) and not (tmp_path / "hf").exists()


def test_what_is_exported_is_told_where_it_cannot_be_registered(tmp_path, monkeypatch):
    def fail(*given) -> list[str]:
        raise StorageError("gone")

    trained(tmp_path / "run", "llama", steps=(10, 20))
    monkeypatch.setattr("jobs.export.registry", lambda *given: "an MLflow")
    monkeypatch.setattr("jobs.export.register", fail)
    options = ("--series", "--to", f"{tmp_path}/hf", "--register", "ok", "--tracking-uri", "sqlite:////nowhere/no.db")
    done = CliRunner().invoke(app, ["export", f"{tmp_path}/run", *options])
    assert [line.rpartition(" in ")[2] for line in done.stdout.splitlines()] == [
        f"{tmp_path}/hf/step-000000{step}" for step in (10, 20)
    ]
    assert isinstance(done.exception, StorageError) and str(done.exception) == "gone"


def test_a_checkpoint_whose_model_is_no_longer_allowed_is_told(tmp_path):
    trained(tmp_path / "run", "moonlight")
    log = RunLog(Store(str(tmp_path / "run")))
    (commit,) = log.commits
    manifest = Manifest.read(log.store, commit.manifest, commit.sha256)
    manifest.identity["model"] |= {"moe_intermediate_size": 12}
    with pytest.raises(ConfigError, match="run-7 at step 10: moe_intermediate_size must be a multiple of 8"):
        model_of(manifest)
