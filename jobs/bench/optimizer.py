"""What the optimizer costs: raymuon against DeepSpeed's own Muon in both of its wrappers, AdamW, and the bare products.

An optimizer's cost is a whole training step less the same round's step with an optimizer that does nothing, in the same
wrapper: DeepSpeed does a part of its Muon in the backward pass. All engines live in the same processes and take their
steps in turns, with the same oneDNN cap and one thread each. The floor is the time of the plan's matrix products alone
on the slowest rank.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.process import torchrun
from jobs.load import load, plain_yaml

MIXES = {
    "moonlight_dp4": (
        4,
        [
            "model.hidden_size=704",
            "model.num_layers=3",
            "model.num_heads=8",
            "model.kv_lora_rank=176",
            "model.qk_nope_head_dim=64",
            "model.qk_rope_head_dim=32",
            "model.v_head_dim=64",
            "model.intermediate_size=1408",
            "model.moe_intermediate_size=480",
            "model.num_experts=6",
            "model.num_shared_experts=1",
        ],
    ),
    "llama_dp2": (
        2,
        [
            "model.name=llama",
            "model.hidden_size=384",
            "model.num_layers=8",
            "model.num_heads=6",
            "model.num_kv_heads=2",
            "model.head_dim=64",
            "model.intermediate_size=1024",
        ],
    ),
}
"""World size and model of each mix: a third of Moonlight's width with stacked experts, and shapes like Llama's."""
CONFIG = {"moonlight_dp4": "demo", "llama_dp2": "demo-llama"}
BATCH = ["train.global_batch=4", "train.micro_batch=1", "train.seq_len=32"]


def optimizer(overrides: list[str], rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure both mixes.

    Args:
        overrides: of the config, for instance optim.ns_coefficients=polar_express.
        rounds: counted steps of each optimizer.
        say: takes a line about each mix.
    """
    report = {}
    for name, (world_size, model) in MIXES.items():
        with tempfile.TemporaryDirectory(prefix="raymuon-optimizer-") as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(plain_yaml(load(CONFIG[name], [*model, *BATCH, *overrides])))
            found = torchrun(world_size, "jobs.bench.optimizer_rank", path, rounds)
        costs = found["median_ms"]
        builtin = {rival: cost for rival, cost in costs.items() if rival.startswith("deepspeed")}
        report[name] = {
            "ratio_to_best_builtin": costs["raymuon"] / min(builtin.values()),
            "ratio_to_floor": costs["raymuon"] / found["floor_ms"],
            **found,
            "world_size": world_size,
            "rounds": rounds,
        }
        say(f"{name}: " + ", ".join(f"{who} {cost:.0f} ms" for who, cost in costs.items()))
    return report
