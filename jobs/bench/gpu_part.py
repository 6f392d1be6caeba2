"""A part of `bench gpu` in a process of its own: an error of CUDA ends all that the process would still have done.

Started as `python -m jobs.bench.gpu_part true|false NAME...`; tells each row, as JSON, as soon as it is there. Without
a GPU there is no such error, and one process does all parts.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict

import torch

from jobs.bench import gpu_kernels, gpu_model
from jobs.bench.gpu_rows import Bench, Row, one_line
from jobs.load import load
from jobs.tell import tell
from workers.config import MoonlightConfig

PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "attention": gpu_kernels.attention,
    "experts": gpu_kernels.mixture,
    "memory": gpu_model.memory,
    "loss": gpu_kernels.loss,
    "copy": gpu_kernels.copy,
    "newton-schulz": gpu_kernels.orthogonalization,
    "speed": lambda bench: gpu_model.speed(bench, lambda text: tell({"calibration": text})),
}
"""In the order of the table; the last one, which compiles most, has the time that the others leave."""


def main(tiny: bool, names: list[str]) -> None:
    """Measure."""
    model = load("moonlight-16b", []).model
    assert isinstance(model, MoonlightConfig)
    torch.manual_seed(0)
    bench = Bench.of(model, tiny)
    # A compiler takes a minute on a CPU, and the tiny form is there to show that all else runs.
    with torch.compiler.set_stance("force_eager") if tiny else nullcontext():
        for name in names:
            try:
                for row in PARTS[name](bench):
                    tell({"row": {"part": name, **asdict(row), "ratio": row.ratio}})
            except Exception as error:  # What the part needs for all its rows.
                tell({"row": {"part": name, **asdict(Row(name, problem=one_line(error)))}})


if __name__ == "__main__":
    main(sys.argv[1] == "true", sys.argv[2:])
