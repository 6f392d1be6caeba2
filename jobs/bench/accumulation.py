"""How exact the sum of a step's gradients is: in the precision of the weights, in fp32, and in parts, against fp64.

The gradients are the demo's at its beginning, in bf16 as a GPU has them, of as many micro-batches of one sequence as a
rank may run in a step. Started as `python -m jobs.bench.accumulation CONFIG COUNT...` in a process of its own, as the
products of bf16 need an environment.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.bench.process import ALIKE, python, run_json
from jobs.load import load, plain_yaml
from jobs.tell import tell
from orchestrator.config import absolute
from workers.data.prepare import prepare
from workers.data.tokens import TokenSplit
from workers.models import LanguageModel, build
from workers.objective import batch_of, summed_loss

RANKS = 8
"""Over which gradients in parts are reduced, in bf16, before they are added up."""


def accumulation(overrides: list[str], counts: list[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Return the relative error of each sum, by the number of micro-batches.

    Args:
        overrides: of the demo's config.
        counts: of micro-batches; in parts so many of each of RANKS ranks are taken for one.
        say: takes a line about each count.
    """
    with tempfile.TemporaryDirectory(prefix="raymuon-accumulation-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(plain_yaml(absolute(load("demo", overrides))))
        found = run_json(python("jobs.bench.accumulation", str(path), *map(str, counts)), **ALIKE)
    for count, errors in found["relative_error"].items():
        say(f"{count} micro-batches: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    return found


def main(config_path: str, counts: list[int]) -> None:
    """Add up, and tell the errors after each count."""
    config = load(config_path, [])
    torch.manual_seed(config.seed)
    model = build(config.model).to(torch.bfloat16).train()
    (corpus,) = prepare(config.data)
    tokens = TokenSplit(corpus, corpus.train, config.train.seq_len, 1.0)
    size = sum(parameter.numel() for parameter in model.parameters())
    exact, in_fp32 = torch.zeros(size, dtype=torch.float64), torch.zeros(size)
    in_weights, together = (torch.zeros(size, dtype=torch.bfloat16) for _ in range(2))
    in_parts = torch.zeros(size)
    errors: dict[str, dict[str, float]] = {}
    for number in range(1, max(counts) + 1):
        new = _gradient(model, torch.from_numpy(tokens.batch(np.array([number * 7919 % tokens.num_samples]))))
        exact += new.double()
        in_fp32 += new.float()
        in_weights += new
        together += new / RANKS  # A ring adds one rank's after the other's.
        if number % RANKS == 0:
            in_parts += together.float() * RANKS
            together.zero_()
        if number in counts:
            sums = {"weights": in_weights, "fp32": in_fp32, "partitioned": in_parts}
            errors[str(number)] = {name: _error(one, exact) for name, one in sums.items()}
    tell({"relative_error": errors, "ranks": RANKS})


def _gradient(model: LanguageModel, tokens: Tensor) -> Tensor:
    batch = batch_of(tokens.long())
    model.zero_grad()
    loss = summed_loss(model(*batch.given), model.head, batch.targets)
    (loss / batch.counted).backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else p.detach().flatten() * 0 for p in model.parameters()])


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


if __name__ == "__main__":
    main(sys.argv[1], [int(count) for count in sys.argv[2:]])
