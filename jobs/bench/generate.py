"""What a token costs the longer a text gets: with a cache of what was read, and without.

The weights are random, which changes no time. Started as `python -m jobs.bench.generate CONFIG TOKENS` in a process of
its own, of one thread.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs.bench.process import ALIKE, python, run_json
from jobs.load import load, plain_yaml
from jobs.tell import tell
from workers.generate import stream
from workers.models import LanguageModel, build

CONFIGS = ("demo", "demo-llama")
LENGTHS = (100, 1000, 4000)
"""Tokens that were read before those that are timed."""
ANEW = 3
"""Tokens that are timed without a cache."""


def generate(overrides: list[str], tokens: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the milliseconds of a token by length, of both configs.

    Args:
        overrides: of the configs, for instance model.num_layers=8.
        tokens: that are timed with a cache, at each length.
        say: takes a line about each config.
    """
    found = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory(prefix="raymuon-generate-") as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(plain_yaml(load(name, overrides)))
            found[name] = run_json(python("jobs.bench.generate", str(path), str(tokens)), **ALIKE)
        for kind, by_length in found[name].items():
            told = ", ".join(f"{took:.1f} ms at {length}" for length, took in by_length.items())
            say(f"{name}, {kind}: {told}")
    return {"milliseconds_per_token": found, "tokens": tokens}


def main(config_path: str, tokens: int) -> None:
    """Measure one config."""
    config = load(config_path, [])
    torch.manual_seed(config.seed)
    model = build(config.model)
    tell(
        {
            "cache": {str(length): _milliseconds(model, length, tokens, cache=True) for length in LENGTHS},
            "no_cache": {str(length): _milliseconds(model, length, ANEW, cache=False) for length in LENGTHS},
        }
    )


def _milliseconds(model: LanguageModel, length: int, tokens: int, cache: bool) -> float:
    """Return the median over the tokens after the first, which reads the prompt."""
    prompt = torch.randint(len(model.head), (length,)).tolist()
    coming, took = stream(model, [prompt], tokens + 1, cache=cache), []
    next(coming)
    for _ in range(tokens):
        clock = time.perf_counter()
        next(coming)
        took.append(1e3 * (time.perf_counter() - clock))
    return statistics.median(took)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
