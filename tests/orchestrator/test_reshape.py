"""A checkpoint of any world size in an engine of any other: the same tensors, and the same training from there on."""

from dataclasses import replace

import numpy as np
import pytest

from tests.leading import Lead, config_of, tensors_of
from tests.processes import ProcessCluster
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from workers.checkpoint.manifest import BUFFER
from workers.reports import StepDone

pytestmark = pytest.mark.numeric

WORLDS = (1, 2, 3, 4)
SAVED, STEPS = 4, 7
CHANGES: dict[int, dict] = {
    1: {},
    2: {"gradients": "partitioned", "recompute": "all"},
    3: {"gradients": "partitioned", "logits": "chunked", "micro_batch": 1},
    4: {"logits": "chunked", "recompute": "1"},
}
"""Of `train`, with what each world size goes on: the state does not depend on it."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An uninterrupted run at each world size: its task from step SAVED on, and the losses after that."""
    found = {}
    for world_size in WORLDS:
        folder = tmp_path_factory.mktemp(f"world-{world_size}")
        config = config_of(
            folder,
            scaling={"min_workers": world_size, "max_workers": world_size},
            train={"steps": STEPS},
            checkpoint={"every": SAVED},
        )
        with Lead(config, ProcessCluster({"a": 2, "b": 2}), folder) as lead:
            notes = lead.wait()
        manifest = lead.log.manifest(SAVED)
        assert manifest.world_size == len(manifest.shards) == world_size and notes.faults == []
        found[world_size] = replace(lead.controller.saves.task, manifest=manifest), notes.losses[SAVED:]
    return found


@pytest.mark.parametrize("after", WORLDS)
def test_every_tensor_is_the_same_and_training_goes_on_alike(runs, after):
    """Tensors bitwise, momentum and moments included; the next three losses within 1e-5 of the uninterrupted run's."""
    tasks = {before: task for before, (task, _) in runs.items()}
    ranks = run_ranks(after, resumed, tasks)
    for before, (task, expected) in runs.items():
        truth, loaded = tensors_of(task.run_url, task.manifest), {}
        for rank in ranks:
            for key, start, values in rank[before]["pieces"]:
                whole = loaded.setdefault(key, np.full(truth[key].size, np.nan, np.float32))
                assert key[0] == BUFFER or np.isnan(whole[start : start + values.size]).all(), "in one partition alone"
                whole[start : start + values.size] = values
        assert loaded.keys() == truth.keys() and {"momentum_buffer", "exp_avg"} <= {kind for kind, _ in truth}
        assert [key for key, tensor in truth.items() if tensor.tobytes() != loaded[key].tobytes()] == []
        assert ranks[0][before]["losses"] == pytest.approx(expected, rel=1e-5), f"{before} -> {after}"


def resumed(rank: int, world_size: int, tasks: dict) -> dict:
    """Load each checkpoint into an engine; return what is in it, by kind, name and first element, and train on."""
    from workers.state import replicated_tensors, shard_map, shard_tensors

    results = {}
    for before, task in tasks.items():
        changed = replace(task, train=replace(task.train, **CHANGES[world_size]))
        trainer, told = trainer_of(rank, world_size, changed, restore=True)
        engine = trainer.engine
        tensors = [*shard_tensors(engine), *replicated_tensors(engine)]
        flat = np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors])
        pieces = [
            ((kind, f.name), f.start, flat[f.offset : f.offset + f.length].copy())
            for kind, f in shard_map(engine, world_size, rank).fragments
        ]
        trainer.run()
        engine.destroy()
        results[before] = {"pieces": pieces, "losses": [row["loss"] for row in told.of(StepDone)]}
        del trainer, engine
    return results
