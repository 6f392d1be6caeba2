"""The plan against reality: six configs, alone and with two ranks, on this machine without a GPU.

Steps and calibrations are made in turns in the same processes, and each turn's steps are held against the plan from
the calibration that followed them, with the share of the processors that the ranks had during these very steps: the
machine's speed drifts, and other work on it comes and goes. Ratios are plan over reality; the median of the turns
counts.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.bench.process import torchrun
from jobs.load import load, plain_yaml
from jobs.planning.estimate import Machines
from jobs.planning.plan import plan_run
from workers.calibrate import Calibration
from workers.common.errors import ConfigError

SMALL_BATCH = ["train.global_batch=4", "train.micro_batch=2", "train.seq_len=128"]
CONFIGS = {
    "demo": ("demo", []),
    "demo-llama": ("demo-llama", []),
    "llama-40m": (
        "demo-llama",
        [
            *("model.hidden_size=512", "model.num_layers=13", "model.num_heads=8", "model.num_kv_heads=2"),
            *("model.head_dim=64", "model.intermediate_size=1536", *SMALL_BATCH),
        ],
    ),
    "moonlight-40m": (
        "demo",
        [
            *("model.hidden_size=384", "model.num_layers=7", "model.num_heads=6", "model.kv_lora_rank=128"),
            *("model.qk_nope_head_dim=32", "model.qk_rope_head_dim=32", "model.v_head_dim=64"),
            *("model.intermediate_size=1024", "model.moe_intermediate_size=288", "model.num_experts=16"),
            *("model.num_experts_per_token=4", *SMALL_BATCH),
        ],
    ),
    "llama-long": (
        "demo-llama",
        [
            *("model.hidden_size=256", "model.num_layers=6", "model.num_heads=8", "model.num_kv_heads=4"),
            *("model.head_dim=32", "model.intermediate_size=704"),
            *("train.global_batch=8", "train.micro_batch=4", "train.seq_len=2048"),
        ],
    ),
    "llama-wide": (
        "demo-llama",
        ["model.vocab_size=32000", "train.global_batch=4", "train.micro_batch=4", "train.seq_len=1024"],
    ),
}
"""Built-in config and changes of each; the last two need more than 1 GB for their activations, in small blocks and in
blocks that a CPU's allocator gives back."""
FIXED = [
    *("train.steps=10000", "train.validate_every=0", "train.validate_sequences=1", "train.sample_prompt=''"),
    *("telemetry.every=0", "checkpoint.every=0"),
]
WORLD_SIZES = (1, 2)
TOLERANCE, COUNTED_FROM = 0.25, 10**9
"""Of times and of growths; bytes from which a growth counts: below, libraries' own memory is a large part of it."""


def against_reality(overrides: list[str], turns: int, only: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure and compare.

    Args:
        overrides: of all configs.
        turns: of steps and calibration.
        only: a name of `CONFIGS`; empty for all of them.
        say: takes a line about each measurement.

    Raises:
        ConfigError: there is no such config.
    """
    if only and only not in CONFIGS:
        raise ConfigError(f"--only {only}: must be one of {', '.join(CONFIGS)}")
    found = []
    for name, (built_in, changes) in CONFIGS.items():
        if only in ("", name):
            for ranks in WORLD_SIZES:
                found.append(_compare(name, built_in, [*changes, *FIXED, *overrides], ranks, turns))
                say(_line(found[-1]))
    return {
        "measured": found,
        "state_exact": all(one["state_bytes"] == one["planned_state_bytes"] for one in found),
        "worst_step_ratio": _worst(one["step_ratio"] for one in found),
        "worst_growth_ratio": _worst(one["growth_ratio"] for one in found if one["growth_bytes"] >= COUNTED_FROM),
        "tolerance": TOLERANCE,
    }


def _compare(name: str, built_in: str, overrides: list[str], ranks: int, turns: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="raymuon-plan-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(plain_yaml(load(built_in, overrides)))
        real = torchrun(ranks, "jobs.bench.plan_rank", path, f"{folder}/run", turns)
        config = load(str(path), [])
    plans = []
    for shares, text in zip(real["shares"], real["calibrations"], strict=True):
        measured = replace(Calibration.from_json(text), share=min(shares))
        machines = Machines(gpus=ranks, gpus_per_node=ranks, calibration=measured)
        plans.append(plan_run(config, machines))
    steps = [statistics.median(seconds) for seconds in real["seconds"]]
    ratios = [plan.time.training / step for plan, step in zip(plans, steps, strict=True)]
    plan = plans[0]
    return {
        "config": name,
        "world_size": ranks,
        "parameters": plan.parameters,
        "state_bytes": real["state"],
        "planned_state_bytes": plan.memory.state["master weights"] + plan.memory.state["optimizer state"],
        "growth_bytes": real["growth"],
        "planned_growth_bytes": plan.memory.peak,
        "growth_ratio": plan.memory.peak / real["growth"],
        "worst_phase": plan.memory.worst_phase,
        "step_seconds": statistics.median(steps),
        "step_ratio": statistics.median(ratios),
        "step_ratios": ratios,
        "shares": real["shares"],
    }


def _worst(ratios: Any) -> float | None:
    return max(ratios, key=lambda ratio: abs(ratio - 1), default=None)


def _line(one: dict[str, Any]) -> str:
    return (
        f"{one['config']}, {one['world_size']} rank(s): step {one['step_seconds']:.2f} s, plan {one['step_ratio']:.2f} "
        f"of it; peak {one['growth_bytes'] / 1e6:,.0f} MB, plan {one['growth_ratio']:.2f}; state "
        + ("exact" if one["state_bytes"] == one["planned_state_bytes"] else "NOT as planned")
    )
