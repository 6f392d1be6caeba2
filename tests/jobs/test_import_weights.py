"""The tensors of imported folders: each is accounted for, as transformers reads it, or the folder is refused."""

import json
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.export import export
from jobs.folder_model import EMBEDDING, HEAD
from jobs.import_ import import_model
from tests.jobs.folders import GONE, KINDS, difference, refused
from tests.jobs.test_export import MODELS, trained

QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_tied_embeddings_are_shared_where_the_config_says_so_and_never_else(folder_of):
    def without_head(tensors):
        return {key: tensor for key, tensor in tensors.items() if key != HEAD}

    def equal_head(tensors):
        return tensors | {HEAD: tensors[EMBEDDING].clone()}

    said: list[str] = []
    assert difference(folder_of("llama", {"tie_word_embeddings": True}, without_head)) < 1e-4
    assert difference(folder_of("llama", {"tie_word_embeddings": True}, equal_head)) < 1e-4
    folder = folder_of("llama", {"tie_word_embeddings": True}, without_head)
    import_model(str(folder), f"{folder}-told", said.append)
    assert said == ["the output layer, which was the embedding, becomes one of its own: they may part in training"]
    for tied in (False, GONE):
        found = refused(folder_of("llama", {"tie_word_embeddings": tied}, without_head))
        assert "there is no tensor lm_head.weight, and config.json has no tie_word_embeddings: true" in found
    assert "lm_head.weight is another than" in refused(folder_of("llama", {"tie_word_embeddings": True}))


QUANTIZED = {
    "fp8 with scales": lambda w: {QUERY: w.to(torch.float8_e4m3fn), f"{QUERY}_scale_inv": torch.ones(1, 1)},
    "fp8 alone": lambda w: {QUERY: w.to(torch.float8_e5m2)},
    "int8 with SCB": lambda w: {QUERY: w.to(torch.int8), QUERY.replace("weight", "SCB"): torch.ones(32)},
    "4 bit": lambda w: {QUERY: w.to(torch.uint8).view(-1, 1), f"{QUERY}.absmax": torch.ones(16)},
    "packed": lambda w: {QUERY: GONE, QUERY.replace("weight", "qweight"): w.to(torch.int32)},
    "compressed": lambda w: {QUERY: GONE, f"{QUERY}_packed": w.to(torch.int32), f"{QUERY}_scale": torch.ones(32, 1)},
    "blocks": lambda w: {QUERY: GONE, f"{QUERY}_blocks": w.to(torch.uint8), f"{QUERY}_scales": w.to(torch.uint8)},
    "scales of the right dtype": lambda w: {f"{QUERY}_scale": torch.ones(32, 1)},
    "bool": lambda w: {QUERY: w > 0},
    "complex": lambda w: {QUERY: w.to(torch.complex64)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_are_refused(folder_of, kind):
    from transformers.utils.quantization_config import QuantizationMethod

    for method in QuantizationMethod:
        found = refused(folder := folder_of(kind, {"quantization_config": {"quant_method": method.value}}))
        assert "quantization_config" in found and repr(method.value) in found
        shutil.rmtree(folder)
    for quantized in ({}, [], "fp8", {"load_in_8bit": True}):
        assert "quantization_config" in refused(folder_of(kind, {"quantization_config": quantized}))
    for name, change in QUANTIZED.items():

        def changed(tensors, change=change):
            tensors |= change(tensors[QUERY])
            return {key: tensor for key, tensor in tensors.items() if tensor is not GONE}

        assert QUERY.removesuffix("weight") in refused(folder_of(kind, {}, changed)), name


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F8_E4M3FNUZ", "I16", "U16", "I64", "U64", "XX"])
def test_dtypes_that_torch_may_not_know_are_refused(folder_of, dtype):
    folder = folder_of("llama")
    raw = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    norm = header["model.norm.weight"]
    first, last = norm["data_offsets"]  # 32 numbers of 4 bytes each.
    bits = {"F4": 4, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "I16": 16, "U16": 16, "I64": 64, "U64": 64}
    norm |= {"dtype": dtype, "shape": [(last - first) * 8 // bits.get(dtype, 8)]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    found = refused(folder)
    assert f"model.norm.weight is of dtype {dtype}" in found or ("not a safetensors file" in found and dtype in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_all_usual_dtypes_are_taken(folder_of, dtype):
    folder = folder_of("deepseek_v3", {}, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
    assert difference(folder) < 1e-4


@pytest.mark.parametrize(("value", "dtype"), [("nan", "float32"), ("-inf", "bfloat16"), (1e300, "float64")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(folder_of, name, value, dtype):
    def poisoned(tensors):
        tensors[name] = tensors[name].to(getattr(torch, dtype))
        tensors[name].view(-1)[7] = float(value)
        return tensors

    assert f"{name} has elements that are NaN or infinite" in refused(folder_of("deepseek_v3", {}, poisoned))


def test_stale_files_never_win(folder_of):
    """Beside an index lies what is of another model: earlier and later by name, known to the index or not."""

    def split(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        parts = {f"model-0000{n}-of-00002.safetensors": list(tensors)[n - 1 :: 2] for n in (1, 2)}
        for file, names in parts.items():
            save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        where = {name: file for file, names in parts.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return tensors, where

    good = folder_of("llama")
    split(good)
    assert difference(good) < 1e-4
    for stale in ("a.safetensors", "model.safetensors", "zz.safetensors"):
        folder = folder_of("llama")
        tensors, _ = split(folder)
        save_file({QUERY: tensors[QUERY] + 1}, folder / stale)
        assert f"{QUERY} is in" in refused(folder) and stale in refused(folder)
    folder = folder_of("llama")
    split(folder)
    save_file({"other.weight": torch.ones(2)}, folder / "zz.safetensors")
    assert "other.weight is in zz.safetensors, and model.safetensors.index.json puts it into none" in refused(folder)
    for change, told in (
        ({QUERY: "model-00003-of-00003.safetensors"}, "puts it into model-00003-of-00003.safetensors"),
        ({QUERY: "../model.safetensors"}, "puts it into ../model.safetensors"),
        ({QUERY: 7}, "puts it into 7"),
        ({"other.weight": "model-00001-of-00002.safetensors"}, "other.weight is in no file"),
    ):
        folder = folder_of("llama")
        _, where = split(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where | change}))
        assert told in refused(folder)
    for index in ("[]", "{}", '{"weight_map": []}', "{"):
        (good / "model.safetensors.index.json").write_text(index)
        assert "model.safetensors.index.json" in refused(good)


def test_leftovers_are_refused_but_for_what_is_known_anyway(folder_of):
    def more(name, tensor):
        return lambda tensors: tensors | {name: tensor}

    mtp = "model.layers.2.eh_proj.weight"
    assert f"has no place for {mtp}" in refused(folder_of("deepseek_v3", {}, more(mtp, torch.ones(2))))
    bias = QUERY.replace("weight", "bias")
    assert f"has no place for {bias}" in refused(folder_of("llama", {}, more(bias, torch.ones(32))))
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    right = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert difference(folder_of("llama", {}, more(frequencies, right.bfloat16()))) < 1e-4
    wrong = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert "rope_theta, 500000.0" in refused(folder_of("llama", {}, more(frequencies, wrong)))


def test_without_shared_experts_transformers_empty_tensors_are_nothing(tmp_path):
    from transformers import AutoModelForCausalLM

    trained(tmp_path / "run", replace(MODELS["moonlight"], num_shared_experts=0))
    export(str(tmp_path / "run"), str(tmp_path / "hf"), "float32")
    assert difference(tmp_path / "hf") < 1e-4
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    assert difference(tmp_path / "again") < 1e-4
