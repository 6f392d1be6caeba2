"""A router that collapses: experts that get no token until nothing is left of their momentum."""

from dataclasses import replace

import pytest
import torch

from optim.config import OptimConfig
from tests.ranks import run_ranks
from tests.trainer import trainer_of
from tests.workers.test_loop import task_of
from workers.config import TelemetryConfig
from workers.reports import StepDone
from workers.task import Task

FORCED_AT = 30
"""The experts have momentum by then."""


def collapsed(rank: int, world_size: int, task: Task, forced: bool) -> dict:
    """Train; where it is forced, from FORCED_AT on with biases that let all tokens go to two experts."""
    trainer, told = trainer_of(rank, world_size, task)
    model = trainer.engine.model
    weights = lambda: {name: p.detach().clone() for name, p in model.named_parameters()}  # noqa: E731
    before, loads, count = weights(), [], trainer._count

    def watch(step, boundary):
        loads.append(boundary.expert_load.clone())
        count(step, boundary)
        if forced and step == FORCED_AT:
            before.update(weights())
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):
                    buffer[2:] = -10.0

    trainer._count = watch
    outcome = trainer.run()
    state = [tensor for group in trainer.engine.optimizer.flat_state(rank) for tensor in group.tensors.values()]
    return {
        "outcome": outcome,
        "rows": told.of(StepDone),
        "loads": torch.stack(loads),
        "before": before,
        "weights": weights(),
        "finite": all(tensor.isfinite().all() for tensor in state),
    }


# In both hardly a float is as small in the end as the momentum's decay: 0.5^250 and 0.9^600.
@pytest.mark.parametrize(
    ("forced", "steps", "idle_steps", "momentum"),
    [(True, 300, 250, 0.5), (False, 750, 600, 0.9)],
    ids=["forced", "natural"],
)
def test_experts_that_get_no_token_for_long_stay_as_they_are(tmp_path, forced, steps, idle_steps, momentum):
    task = task_of(tmp_path, steps=steps, global_batch=2, validate_every=0)
    task = replace(
        task,
        model=replace(task.model, router_bias_rate=0.0, num_experts=16),
        optim=OptimConfig(lr=3e-2 if forced else 0.2, weight_decay=0.02, momentum=momentum),
        telemetry=TelemetryConfig(every=50),
    )
    (result,) = run_ranks(1, collapsed, task, forced)
    assert result["outcome"] == "finished" and result["finite"]
    assert all(weight.isfinite().all() for weight in result["weights"].values())
    assert result["rows"][-1]["skipped"] == 0
    idle = result["loads"][-idle_steps:].sum(0) == 0  # [layers, experts]
    assert idle.any(), "nothing has collapsed"
    if forced:
        stacks = [(n, w) for n, w in result["weights"].items() if ".experts." in n]
        for name, weight in stacks:
            cosine = torch.cosine_similarity(weight.flatten(1), result["before"][name].flatten(1))
            assert (cosine[2:] > 0.9999).all(), "an expert without a token is not turned"
            assert (cosine[:2] < 0.9).all()


@pytest.mark.parametrize(("experts", "learns"), [(1, False), (2, True)])
def test_a_router_whose_gate_is_always_one_is_not_moved_by_rounding(tmp_path, experts, learns):
    """With one expert per token the renormalized gate is 1 whatever it says: its gradient is 1e-7 of others."""
    task = task_of(tmp_path, steps=30, validate_every=0)
    task = replace(
        task,
        model=replace(task.model, num_experts_per_token=experts),
        optim=OptimConfig(lr=1e-2, weight_decay=0.0),
        telemetry=TelemetryConfig(every=0),
    )
    (result,) = run_ranks(1, collapsed, task, False)
    (router,) = (name for name in result["weights"] if name.endswith("mlp.gate.weight"))
    moved = (result["weights"][router] - result["before"][router]).norm()
    assert moved > 0.1 if learns else moved == 0
