"""Imported models against transformers, which is the oracle: the same logits, or a refusal that says why."""

import json
import shutil
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from jobs import import_
from jobs.architectures import ARCHITECTURES
from jobs.checkpoints import open_checkpoint
from jobs.cli import app
from jobs.config_json import describe
from jobs.export import export
from jobs.import_ import import_model
from jobs.load import load
from jobs.screen import Screen
from jobs.tokenizer import train_tokenizer
from jobs.trained import model_of
from orchestrator.origin import other_tokens
from tests.jobs.folders import GONE, KINDS, TOKENS, difference, refused
from tests.jobs.test_export import MODELS, trained
from workers.common.errors import ConfigError, StorageError
from workers.data.config import DataConfig
from workers.data.tokenizer_files import open_tokenizer

DEFAULTS = {architecture.model_type: architecture.defaults for architecture in ARCHITECTURES.values()}


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saved_comes_back(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = trained(tmp_path / "run", name)
    export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    reader = open_checkpoint(import_model(str(tmp_path / "again"), str(tmp_path / "imported")))
    expected = {**dict(model.named_parameters()), **{k: v for k, v in model.named_buffers() if k in model.state_dict()}}
    found = {key: reader.tensor(kind, key) for kind in reader.kinds for key in reader.names(kind)}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key].detach().numpy()) for key in expected)
    assert model_of(reader.manifest) == MODELS[name]


def test_the_published_config_of_moonlight_is_our_16b():
    published = json.loads("""
    {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": false,
    "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha":
    0.001, "seq_aux": true, "bos_token_id": 163584, "eos_token_id": 163586, "ep_size": 1, "vocab_size": 163840,
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "intermediate_size": 11264, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "first_k_dense_replace": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.446,
    "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rope_theta": 50000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "hidden_act": "silu",
    "initializer_range": 0.02, "num_nextn_predict_layers": 0, "pretraining_tp": 1, "tie_word_embeddings": false,
    "use_cache": true, "torch_dtype": "bfloat16", "transformers_version": "4.46.3"}
    """)
    assert describe(published).model == load("moonlight-16b", []).model
    assert describe(published).about["eos_token_id"] == 163586


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_leaves_out_is_transformers_own(kind):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(kind)
    assert {key: DEFAULTS[kind][key] for key in DEFAULTS[kind] if key not in ("head_dim", "num_key_value_heads")} == {
        key: getattr(theirs, key) for key in DEFAULTS[kind] if key not in ("head_dim", "num_key_value_heads")
    }
    assert theirs.rope_parameters["rope_theta"] == describe({"model_type": "llama"}).model.rope_theta == 10000
    ours = DEFAULTS["llama"] | {"model_type": "llama"}
    assert describe({"model_type": "llama"}) == describe(ours)


SAID = [
    {"rope_parameters": GONE},
    {"rope_parameters": GONE, "rope_theta": 777},
    {"rope_parameters": {"rope_theta": 777.0, "type": "default"}},
    {"rope_parameters": {"rope_theta": 777.0}, "rope_theta": 777.0},
    {"rope_parameters": GONE, "rope_theta": 777.0, "rope_scaling": None},
    {"rope_parameters": GONE, "rope_theta": 777.0, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": GONE, "rope_scaling": {"rope_type": "default", "rope_theta": 777.0}},
    {"rms_norm_eps": GONE},
    {"rms_norm_eps": 0.03},
    {"initializer_range": GONE, "max_position_embeddings": GONE, "eos_token_id": [1, 2]},
    {"num_nextn_predict_layers": 1, "pretraining_tp": 2, "sliding_window": None, "auto_map": {"AutoModel": "x.y"}},
    {"architectures": GONE, "torch_dtype": "bfloat16", "tie_word_embeddings": GONE},
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_accepted_has_transformers_logits(folder_of, kind):
    own = {
        "llama": [{"head_dim": None}, {"head_dim": GONE}, {"rope_interleaved": False}],
        "deepseek_v3": [
            {"first_k_dense_replace": 1, "num_local_experts": 6, "head_dim": 8, "qk_head_dim": 16},
            {"num_key_value_heads": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
            {"routed_scaling_factor": 0.5, "aux_loss_alpha": 0.1, "seq_aux": True, "ep_size": 1},
        ],
    }
    assert [change for change in (SAID + own[kind]) if not difference(folder_of(kind, change)) < 1e-4] == []


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_key_says_it_is_refused_or_means_what_transformers_takes(folder_of, kind):
    """A key that is missing, too. Where transformers takes no whole number for a fraction, we do."""
    wrong, taken = [], 0
    for key in [
        *DEFAULTS[kind],
        "rope_theta",
        "rope_scaling",
        "head_dim",
        "num_local_experts",
        "partial_rotary_factor",
    ]:
        for value in (GONE, None, 2, 0.5):
            folder = folder_of(kind, {key: value})
            try:
                far = difference(folder)
            except ConfigError:
                continue
            except Exception as error:
                if "expected float, got int" in str(error):
                    continue
                far = float("nan")
            finally:
                shutil.rmtree(folder)
            taken += 1
            if not far < 1e-4:
                wrong.append((key, value, far))
    assert wrong == [] and taken > 20


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_change_the_arithmetic_is_refused_by_name(folder_of, kind):
    scaled = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "ntk", None)
    refusals: list[tuple[dict, str]] = [
        *(({"rope_parameters": {"rope_type": one, "rope_theta": 1e4, "factor": 2.0}}, "scaled") for one in scaled),
        *(({"rope_parameters": {"type": one, "rope_theta": 1e4, "factor": 2.0}}, "scaled") for one in scaled),
        *(({"rope_scaling": {"type": one, "factor": 2.0}}, "scaled rotary positions") for one in scaled),
        ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, "scaled rotary positions"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "rope_parameters.factor is not known"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e4}, "rope_theta=50000.0 and rope_parameters.rope_th"),
        ({"rope_parameters": GONE, "rope_theta": 1e4, "rope_scaling": {"rope_theta": 2.0}}, "differ"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta must be a number, not None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', not 'gelu'"),
        ({"attention_bias": True}, "attention_bias must be False, not True"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.0"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures must be"),
        ({"sliding_window": 4}, "sliding_window: raymuon does not know"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"logits_scaling": 2.0, "final_logit_softcapping": 30.0}, "final_logit_softcapping, logits_scaling: raymuon"),
        ({"per_layer_config": {"0": {"hidden_act": "relu"}}}, "per_layer_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"qk_norm": True}, "qk_norm"),
        ({"compression_config": {}}, "compression_config"),
        ({"vocab_size": 100}, "vocab_size must be 256"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number, not '32'"),
        ({"hidden_size": 32.0}, "hidden_size must be a whole number, not 32.0"),
        ({"hidden_size": True}, "hidden_size must be a whole number, not True"),
        ({"hidden_size": -32}, "hidden_size must be 1 or more"),
        ({"hidden_size": 1 << 40}, "config.json says"),
        ({"hidden_size": 1 << 100}, "sizes that no tensor can have"),
        ({"vocab_size": 1 << 62}, "sizes that no tensor can have"),
        ({"num_hidden_layers": 1 << 40}, "config.json says num_layers 1099511627776, there are"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a whole number, not None"),
        ({"num_hidden_layers": 3}, "there is no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "has no place for model.layers.1."),
        ({"intermediate_size": 64}, "config.json says"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"initializer_range": float("inf")}, "initializer_range must be a finite number"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token's number"),
        ({"bos_token_id": [1]}, "bos_token_id must be a token's number, not [1]"),
        ({"pad_token_id": 256}, "pad_token_id must be below vocab_size, not 256"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings must be True or False"),
        ({"model_type": "gpt2"}, "model_type must be deepseek_v3 or llama, not 'gpt2'"),
        ({"model_type": GONE}, "model_type must be deepseek_v3 or llama, not None"),
        ({"model_type": ["llama"]}, "model_type"),
    ]
    own: dict[str, list[tuple[dict, str]]] = {
        "llama": [
            ({"num_attention_heads": 0}, "num_heads must be 1 or more, not 0"),
            ({"mlp_bias": True}, "mlp_bias must be False"),
            ({"rope_interleaved": True}, "rope_interleaved must be False"),
            ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
            ({"head_dim": 16}, "config.json says"),
            ({"n_group": 1}, "n_group"),
        ],
        "deepseek_v3": [
            ({"q_lora_rank": GONE}, "q_lora_rank must be None, not 1536 (transformers' value where it is missing)"),
            ({"n_group": GONE}, "n_group must be 1, not 8 (transformers' value where it is missing)"),
            ({"topk_group": GONE}, "topk_group must be 1, not 4"),
            ({"n_group": 2, "topk_group": 1}, "n_group must be 1, not 2"),
            ({"norm_topk_prob": False}, "norm_topk_prob must be True"),
            ({"rope_interleave": False}, "rope_interleave must be True"),
            ({"scoring_func": "softmax"}, "scoring_func must be 'sigmoid'"),
            ({"topk_method": "greedy"}, "topk_method must be 'noaux_tc'"),
            ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
            ({"num_key_value_heads": 1}, "num_key_value_heads must be 2 or None, not 1"),
            ({"head_dim": 4}, "head_dim must be 8, not 4"),
            ({"num_local_experts": 3}, "num_local_experts must be 6"),
            ({"n_shared_experts": None}, "n_shared_experts must be a whole number, not None"),
            ({"n_routed_experts": 1 << 40, "num_local_experts": GONE}, "says num_experts 1099511627776"),
            (
                {"n_routed_experts": 5, "num_local_experts": GONE},
                "gate.weight has shape [6, 32], config.json says [5, 32]",
            ),
            ({"first_k_dense_replace": 0}, "there is no tensor model.layers.0.mlp"),
        ],
    }
    for change, told in refusals + own[kind]:
        folder = folder_of(kind, change)
        found = refused(folder)
        assert told in found, (change, found)
        shutil.rmtree(folder)


def test_an_imported_model_is_exported_again_as_it_came(folder_of):
    from transformers import AutoModelForCausalLM, GenerationConfig

    ids = {"bos_token_id": 5, "eos_token_id": [7, 9], "pad_token_id": 3, "max_position_embeddings": 99}
    folder = folder_of("llama", ids)
    generation = {"eos_token_id": [7, 9, 11], "bos_token_id": 5, "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    to = import_model(str(folder), f"{folder}-imported")
    done = export(to, f"{folder}-again", "float32")
    again = json.loads((folder.parent / f"{folder.name}-again" / "config.json").read_text())
    assert {key: again[key] for key in ids} == ids
    assert GenerationConfig.from_pretrained(done.url).eos_token_id == [7, 9, 11]
    assert "tokenizer.json" not in done.files, "256 ids are not bytes wherever they come from"
    card = (folder.parent / f"{folder.name}-again" / "README.md").read_text()
    assert f"| imported from | {folder.name} |" in card and "AutoTokenizer" not in card
    loaded, told = AutoModelForCausalLM.from_pretrained(done.url, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits)
    import_model(done.url, f"{folder}-twice")
    (folder / "generation_config.json").unlink()
    to = import_model(str(folder), f"{folder}-without")
    export(to, f"{folder}-third", "float32")
    made = json.loads((folder.parent / f"{folder.name}-third" / "generation_config.json").read_text())
    assert made == {key: ids[key] for key in ids if key.endswith("_token_id")}


def test_what_is_no_model_is_one_message(folder_of, tmp_path):
    def told(folder) -> str:
        result = CliRunner().invoke(app, ["import", str(folder), "--to", str(tmp_path / "x")], standalone_mode=False)
        assert isinstance(result.exception, ConfigError) and result.exception.exit_code == 2, result.exception
        return str(result.exception)

    (tmp_path / "empty").mkdir()
    assert "no config.json of a model" in told(tmp_path / "empty")
    assert "no config.json of a model" in told(tmp_path / "nowhere")
    folder = folder_of("llama")
    good = (folder / "config.json").read_bytes()
    for text in (b"", b"{", b"[]", b'"text"', b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a": {"b": 1, "b": 1}}'):
        (folder / "config.json").write_bytes(text)
        assert "no config.json of a model" in told(folder)
    (folder / "config.json").write_bytes(good)
    for raw in (
        b"",
        b"\1",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 99) + b"{}",
        good,
    ):
        (folder / "model.safetensors").write_bytes(raw)
        assert "model.safetensors: not a safetensors file" in told(folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert "there are 0 tensors" in told(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "no *.safetensors there; other formats are not read; pytorch_model.bin cannot be read" in told(folder)
    (folder / "generation_config.json").write_text("[")
    assert "no generation_config.json of a model" in told(folder)
    adapter = folder_of("llama")
    (adapter / "adapter_config.json").write_text("{}")
    assert "merge the adapter" in told(adapter)


def test_a_model_comes_with_its_tokenizer_and_is_exported_with_it(folder_of, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "text.txt").write_text("some text of some words, and some more words of text\n" * 9)
    train_tokenizer(f"{tmp_path}/text.txt", 270, f"{tmp_path}/made", "text", 0, Screen(quiet=True))
    folder = folder_of("llama", {})
    for file in (tmp_path / "made").iterdir():
        shutil.copy(file, folder)
    url = import_model(str(folder), f"{folder}-imported")
    identity, tokenizer = open_checkpoint(url).manifest.identity, open_tokenizer(DataConfig(tokenizer=str(folder)))
    assert identity["data.tokenizer"] == tokenizer.sha256 and not other_tokens(identity, tokenizer.sha256)
    assert "this run's tokens are of bytes" in other_tokens(identity, "")
    done = export(url, f"{folder}-again", "float32")
    ids = AutoTokenizer.from_pretrained(done.url)("some words")["input_ids"]
    assert ids == tokenizer.encode([b"some words"])[0].tolist() and len(ids) < 5


def test_a_run_that_begins_with_the_weights_of_another_vocabulary_says_so(folder_of):
    for changes, told in (({}, False), ({"eos_token_id": [0, 7]}, True), ({"eos_token_id": 7}, True)):
        folder = folder_of("llama", changes)
        identity = open_checkpoint(import_model(str(folder), f"{folder}-imported")).manifest.identity
        said = other_tokens(identity, "")
        assert bool(said) == told and (not told or f"train.init: {folder.name} was trained with" in said)
    assert not other_tokens({"data": "d"}, ""), "a checkpoint of a run"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("full")])
def test_an_import_that_is_ended_takes_away_what_it_wrote(folder_of, tmp_path, monkeypatch, error):
    """In the middle, with the tokenizer and the log written; where the disk has no room, nothing is begun."""
    written = []

    def end(store, *_) -> None:
        written.extend(store.files(""))
        raise error

    folder, to = folder_of("llama"), tmp_path / "to"
    monkeypatch.setattr(import_, "write_shard", end)
    with pytest.raises(type(error)):
        import_model(str(folder), str(to))
    assert written and not to.exists()
    monkeypatch.setattr(import_.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"takes 0\.0 GB in float32, and the disk has 0\.0 GB left"):
        import_model(str(folder), str(to))
    assert not to.exists()
