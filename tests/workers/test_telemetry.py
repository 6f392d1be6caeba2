"""What is measured against the definition, in one process and over several ranks."""

import gzip
import json
import math
from dataclasses import replace

import pytest
import torch

from jobs.load import load
from tests.optim.test_spectra import entropy_by_svd
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from tests.workers.test_llama import LLAMA_3_2_1B
from tests.workers.test_llama import TINY as LLAMA
from tests.workers.test_loop import task_of
from tests.workers.test_moonlight import TINY as MOONLIGHT
from workers.config import TelemetryConfig
from workers.controls import Pause
from workers.gpus import BF16_TFLOPS, GPUS, peak_tflops, type_of
from workers.models import build_empty
from workers.models.language_model import KINDS
from workers.reports import Profiled, StepDone
from workers.task import Task

pytestmark = pytest.mark.numeric

KINDS_OF_MOONLIGHT = build_empty(MOONLIGHT).parameter_kinds()


def measured(rank: int, world_size: int, task: Task) -> dict:
    """Train; return what was told, and all weights before each call of the optimizer and at the end."""
    trainer, told = trainer_of(rank, world_size, task)
    weights = []

    def copy(*_) -> None:
        weights.append({name: p.detach().clone() for name, p in trainer.engine.model.named_parameters()})

    trainer.engine.optimizer.register_step_pre_hook(copy)
    trainer.run()
    copy()
    return {"rows": told.of(StepDone), "traces": told.of(Profiled), "weights": weights}


def of_kind(weights: dict, kind: str) -> list[torch.Tensor]:
    return [weight for name, weight in weights.items() if KINDS_OF_MOONLIGHT[name] == kind]


def test_updates_are_measured_without_the_decay_that_the_width_gives_each_weight(tmp_path):
    task = replace(task_of(tmp_path, steps=1), telemetry=TelemetryConfig(every=1, spectra=0))

    def updates(weight_decay: float) -> dict[str, float]:
        optim = replace(task.optim, weight_decay=weight_decay, width_rule="essential", base_width=8)
        found = run_ranks(2, measured, replace(task, optim=optim))[0]["rows"][0]["measured"]
        return {name: rms for name, rms in found.items() if name.startswith("update_rms/")}

    without, decayed = updates(0.0), updates(9.0)
    assert decayed == pytest.approx(without, rel=1e-3) and without["update_rms/dense"] == pytest.approx(0.05, rel=0.2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_measured_is_what_it_says(tmp_path, world_size):
    every = TelemetryConfig(every=3, spectra=2, peak_tflops=0.5)
    task = replace(task_of(tmp_path, steps=3), telemetry=every)
    results = run_ranks(world_size, measured, task)
    rows = results[0]["rows"]
    assert [bool(row["measured"]) for row in rows] == [False, False, True]
    found = rows[-1]["measured"]
    before, after = results[0]["weights"][2 * 2], results[0]["weights"][-1]  # Two groups, each with a call of its own.
    lr = rows[-1]["lr"]
    for kind in KINDS:
        old = torch.cat([weight.flatten() for weight in of_kind(before, kind)]).double()
        new = torch.cat([weight.flatten() for weight in of_kind(after, kind)]).double()
        update = (old * (1 - lr * task.optim.weight_decay) - new) / lr
        assert found[f"update_rms/{kind}"] == pytest.approx(update.square().mean().sqrt().item(), rel=2e-3), kind
        assert found[f"weight_rms/{kind}"] == pytest.approx(new.square().mean().sqrt().item(), rel=1e-5), kind
    assert found["update_rms/dense"] == pytest.approx(0.2, rel=0.2), "Muon's update has an RMS of 0.2"
    experts = [matrix for stack in of_kind(after, "experts") for matrix in (stack[0], stack[3])]  # Two of six.
    for kind, matrices in {"experts": experts, "router": of_kind(after, "router")}.items():
        values = [entropy_by_svd(matrix) for matrix in matrices]
        assert found[f"svd_entropy/{kind}"] == pytest.approx(sum(values) / len(values), abs=1e-5), kind
    assert found["attention/share_above_100"] == 0 < found["attention/max_logit"] < 100
    assert found["expert_load/max"] >= 1 >= found["expert_load/min"] and 0 <= found["expert_load/idle"] < 1
    spent = {name.removeprefix("seconds/"): s for name, s in found.items() if name.startswith("seconds/")}
    assert spent.keys() == {"forward", "backward", "snapshot", "logits", "reduce", "optimizer", "gather"}
    weights = sum(4 * weight.numel() for weight in after.values())
    once_round = weights * (world_size - 1) / world_size
    assert found.get("bytes_sent/reduce", 0) == pytest.approx(once_round, rel=0.01)
    assert found.get("bytes_sent/all_gather", 0) == pytest.approx(once_round, rel=0.01), "but for the padding"
    assert ("bytes_sent/all_to_all" in found) == (world_size > 1)
    flops = task.train.global_batch * 32 * build_empty(task.model).flops_per_token(32)
    assert found["mfu"] == pytest.approx(flops / sum(spent.values()) / (world_size * 0.5e12))


def test_what_is_measured_does_not_depend_on_the_world_size(tmp_path):
    task = replace(task_of(tmp_path, steps=2), telemetry=TelemetryConfig(every=1, spectra=3))
    alone, together = (run_ranks(size, measured, task)[0]["rows"] for size in (1, 4))
    for a, b in zip(alone, together, strict=True):
        same = [name for name in a["measured"] if not name.startswith(("seconds/", "bytes_sent/", "mfu"))]
        assert len(same) > 20
        for name in same:
            assert b["measured"][name] == pytest.approx(a["measured"][name], rel=1e-3, abs=1e-6), name


def test_chosen_steps_are_traced_by_rank_0(tmp_path):
    task = replace(task_of(tmp_path, steps=4), telemetry=TelemetryConfig(every=0, profile_step=2, profile_steps=2))
    first, second = run_ranks(2, measured, task)
    assert not second["traces"]
    ((step, trace),) = ((found["step"], json.loads(gzip.decompress(found["trace"]))) for found in first["traces"])
    assert step == 3
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert "aten::scaled_dot_product_attention" in names and any("gloo" in name for name in names)


def paused_and_on(rank: int, world_size: int, task: Task) -> list[int]:
    """Leave in the middle of a trace, go on in the same process, and return the steps of the traces."""
    broken_off, first = trainer_of(rank, world_size, task, pause=lambda: Pause(leave=broken_off.counters.step == 2))
    assert broken_off.run() == "paused"
    broken_off.engine.destroy()
    again, second = trainer_of(rank, world_size, task, step=1)
    again.run()
    return [trace["step"] for told in (first, second) for trace in told.of(Profiled)]


def test_a_trace_that_was_broken_off_is_begun_anew(tmp_path):
    task = replace(task_of(tmp_path, steps=6), telemetry=TelemetryConfig(every=0, profile_step=2, profile_steps=3))
    assert run_ranks(1, paused_and_on, task) == [[4]]


def test_a_step_without_a_learning_rate_has_no_update_to_measure(tmp_path):
    every = TelemetryConfig(every=1, peak_tflops=0.5)
    task = replace(task_of(tmp_path, steps=2), telemetry=every)
    task = replace(task, optim=replace(task.optim, final_lr_fraction=0.0))
    first, last = run_ranks(1, measured, task)[0]["rows"]
    assert last["lr"] == 0 and any(name.startswith("update_rms/") for name in first["measured"])
    assert not any(name.startswith("update_rms/") for name in last["measured"])
    assert all(math.isfinite(value) for value in last["measured"].values())


def test_every_parameter_is_of_the_kind_that_one_expects():
    with torch.device("meta"):
        moonlight = build_empty(replace(MOONLIGHT, num_dense_layers=1, num_layers=2))
        llama = build_empty(LLAMA)
    kinds = {name.removeprefix("model.layers.1."): kind for name, kind in moonlight.parameter_kinds().items()}
    assert kinds["self_attn.q_proj.weight"] == kinds["self_attn.o_proj.weight"] == "attention_qo"
    assert kinds["self_attn.kv_a_proj_with_mqa.weight"] == kinds["self_attn.kv_b_proj.weight"] == "attention_kv"
    assert kinds["self_attn.kv_a_layernorm.weight"] == kinds["input_layernorm.weight"] == "norms"
    assert kinds["mlp.experts.up_proj"] == "experts" and kinds["mlp.gate.weight"] == "router"
    assert kinds["mlp.shared_experts.gate_proj.weight"] == "shared_experts"
    assert kinds["model.layers.0.mlp.gate_proj.weight"] == "dense"
    assert kinds["model.embed_tokens.weight"] == "embedding" and kinds["lm_head.weight"] == "head"
    assert set(llama.parameter_kinds().values()) == set(KINDS) - {*("experts", "shared_experts", "router")}


def test_the_arithmetic_of_published_models():
    """6 N for the active parameters without the embedding (facts: 2,579,230,208 for the 16B), and causal attention."""
    with torch.device("meta"):
        moonlight = build_empty(load("moonlight-16b", []).model)
        llama = build_empty(LLAMA_3_2_1B)
    attention = 3 * 2 * 27 * 16 * (192 + 128) * 8192 / 2
    norms = 27 * (2 * 2048 + 512) + 2048
    assert moonlight.flops_per_token(8192) == 6 * (2_579_230_208 - norms) + attention
    assert llama.flops_per_token(1) == pytest.approx(6 * 1_235_814_400, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
    ],
)
def test_peaks_of_known_gpus(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 40),
        ("NVIDIA A100-PCIE-40GB", 40),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("NVIDIA A100 80GB PCIe", 80),
        ("NVIDIA H100 NVL", 94),
        ("NVIDIA GeForce RTX 4090", 24),
    ],
)
def test_the_memory_of_known_gpus(name, expected):
    assert GPUS[type_of(name)].memory_gb == expected


def test_a_gpu_that_is_not_in_the_table():
    assert type_of("NVIDIA A1000 Laptop GPU") == type_of("NVIDIA A30") == type_of("Tesla V100-SXM2-32GB") == ""


def test_the_peak_of_a_cpu_is_measured():
    assert 1e-3 < peak_tflops(torch.device("cpu")) < max(BF16_TFLOPS.values())
