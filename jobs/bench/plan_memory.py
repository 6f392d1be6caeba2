"""The memory that the plan tells against the memory that a rank takes: what saves some, alone and together.

Each variant runs in fresh processes, whose peak is told by Linux; a few steps, of which nothing is timed. Two ranks
with two micro-batches each, so that gradients are parted, reduced and added up.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jobs.bench.plan import COUNTED_FROM, FIXED
from jobs.bench.process import torchrun
from jobs.load import load, plain_yaml
from jobs.planning.choice import memory_alone
from jobs.planning.estimate import Machines, memory_on
from orchestrator.config import RunConfig
from workers.common.errors import ConfigError

WORLD_SIZE = 2
WAYS = {"recompute": ("none", "all"), "gradients": ("whole", "partitioned"), "logits": ("whole", "chunked")}
"""Keys of `train`: without saving, and with it."""
LARGE = (
    "demo-llama",
    [
        *("model.hidden_size=512", "model.num_heads=8", "model.num_kv_heads=4", "model.head_dim=64"),
        *("model.intermediate_size=1536", "model.vocab_size=32768"),
        *("train.global_batch=16", "train.micro_batch=4", "train.seq_len=512"),
    ],
)
"""Of more than 1 GB in any way: 46 M parameters, 2,048 tokens in a micro-batch."""
BEFORE_AND_AFTER = {
    "demo": ("demo", ["train.global_batch=32"]),
    "demo-32k": ("demo", ["train.global_batch=32", "model.vocab_size=32768"]),
}
"""Everything that saves memory against nothing of it; two micro-batches for each rank."""
TOLERANCE = 0.1


def memory_against_reality(overrides: list[str], only: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure and compare.

    Args:
        overrides: of all configs.
        only: a name of a config; empty for all of them.
        say: takes a line about each measurement.

    Raises:
        ConfigError: there is no such config.
    """
    if only and only not in (known := ("large", *BEFORE_AND_AFTER)):
        raise ConfigError(f"--only {only}: must be one of {', '.join(known)}")
    found = []
    for name, built_in, changes, ways in variants():
        if only not in ("", name):
            continue
        keys = [f"train.{key}={value}" for key, value in ways.items()]
        config = load(built_in, [*changes, *keys, "train.accumulate=weights", *FIXED, *overrides])
        found.append({"config": name, **ways, **compare(config, WORLD_SIZE)})
        say(_line(found[-1]))
    counted = [one["ratio"] for one in found if one["measured_bytes"] >= COUNTED_FROM]
    return {
        "memory": found,
        "worst_ratio": max(counted, key=lambda ratio: abs(ratio - 1), default=None),
        "counted_from_bytes": COUNTED_FROM,
        "tolerance": TOLERANCE,
    }


def variants() -> Iterator[tuple[str, str, list[str], dict[str, str]]]:
    """Yield the name, the built-in config, its changes and the ways to save memory of all that are measured."""
    for values in itertools.product(*WAYS.values()):
        yield "large", *LARGE, dict(zip(WAYS, values, strict=True))
    for name, (built_in, changes) in BEFORE_AND_AFTER.items():
        for which in (0, -1):
            yield name, built_in, changes, {key: values[which] for key, values in WAYS.items()}


def compare(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return the growth of the peak of a config's ranks, of the one that grows most, and what the plan says of it."""
    with tempfile.TemporaryDirectory(prefix="raymuon-memory-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(plain_yaml(config))
        measured = torchrun(ranks, "jobs.bench.plan_rank", path, f"{folder}/run", 0)["growth"]
    device = memory_alone(0)
    planned = memory_on(config, Machines(gpus=ranks, gpus_per_node=ranks, calibration=device), device)
    return {
        "world_size": ranks,
        "measured_bytes": measured,
        "planned_bytes": planned.peak,
        "ratio": planned.peak / measured,
        "worst_phase": planned.worst_phase,
    }


def _line(one: dict[str, Any]) -> str:
    return (
        f"{one['config']}, {', '.join(f'{key} {one[key]}' for key in WAYS)}: {one['measured_bytes'] / 1e6:,.0f} MB, "
        f"plan {one['planned_bytes'] / 1e6:,.0f} MB, {one['ratio']:.2f} of it"
    )
