"""Workers import what they use: what is left out of DeepSpeed, and of torch, stays out through a whole training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from optim.config import OptimConfig
from tests.trainer import trainer_of
from workers.config import CheckpointConfig, TelemetryConfig
from workers.data.config import DataConfig
from workers.data.prepare import prepare
from workers.recipe import TrainConfig
from workers.reports import StepDone, Validated
from workers.task import Task

SLOW = {"torch._dynamo", "torch._inductor", "sympy", "mlflow", "transformers", "matplotlib", "pandas", "scipy"}
"""What takes from a tenth of a second to two to import."""


def run(code: str) -> str:
    """Return the last line that a Python of its own prints; one thread, that others on this machine wait for none."""
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=alone).splitlines()[-1]


def train(folder: Path) -> None:
    """Rehearse, then train a mixture of experts as a run does: validation, telemetry, a sample; and recover."""
    from tests.workers.test_moonlight import TINY
    from workers.engine import build_engine, default_device, join_process_group
    from workers.training import HashStore, forget, rehearse

    data = DataConfig(source=str(Path(__file__).parents[2] / "LICENSE"), prepared_url=f"{folder}/data")
    settings = {"steps": 2, "global_batch": 2, "micro_batch": 1, "seq_len": 32, "validate_sequences": 2}
    task = Task(
        model=TINY,
        optim=OptimConfig(qk_clip=100.0, lr=1e-2),
        data=data,
        train=TrainConfig(**settings, sample_prompt="The"),
        checkpoint=CheckpointConfig(),
        telemetry=TelemetryConfig(every=1),
        seed=0,
        corpora=prepare(data),
        run_url=f"{folder}/run",
        attempt=1,
        manifest=None,
    )
    rehearse(task)
    join_process_group(0, 1, HashStore(), default_device())
    trainer, told = trainer_of(0, 1, task)
    trainer.run()
    assert len(told.of(StepDone)) == 2 and told.of(Validated)
    build_engine(TINY, task.optim, task.train, None, default_device())  # As survivors do: a state comes later.
    forget()


def test_a_worker_trains_without_what_takes_long_to_import_and_deepspeed_is_left_as_it_was(tmp_path):
    code = f"from tests.workers.test_lean import train; train({str(tmp_path)!r}); import sys;"
    code += f"print({SLOW} & set(sys.modules), end=' ');"
    code += "import torch, deepspeed.runtime.compiler as compiler, deepspeed.runtime.zero.muon.muon_optimizer as muon;"
    code += "print(compiler.compile() is torch.compile, muon.MuonWithAuxAdam.__mro__[1].__module__)"
    assert run(code) == "set() True deepspeed.runtime.zero.muon.original_muon"


@pytest.mark.parametrize("name", ["rows_product", "stacked_product"])
def test_an_op_that_torch_does_not_look_into_keeps_torchs_rules(name):
    """What `torch.library.custom_op` would have seen to: the schema, and a fake form that is like the real one."""
    import torch

    from workers.models import feed_forward

    x, ends = torch.randn(6, 8), torch.tensor([2, 6], dtype=torch.int32)
    other = torch.randn(2, 8, 4) if name == "rows_product" else torch.randn(6, 4)
    torch.library.opcheck(
        getattr(feed_forward, name).default, (x, other, ends), test_utils=("test_schema", "test_faketensor")
    )
