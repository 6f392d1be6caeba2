"""DeepSpeed's settings, apart from DeepSpeed itself: `raymuon plan` reads there what the engine will do."""

from typing import Any

from optim.config import OptimConfig, precision_on
from workers.recipe import TrainConfig

LARGEST_BUCKET = 500_000_000
"""Elements."""


def overlapped(train: TrainConfig, kind: str) -> bool:
    """Tell whether gradients and weights travel under the passes: on a CPU, whose cores compute, never."""
    return train.overlap and kind == "cuda"


def deepspeed_config(train: TrainConfig, optim: OptimConfig, kind: str, num_parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's settings: ZeRO-1 or 2, our optimizer, and accumulation that we manage ourselves.

    Args:
        train: batch, precision, and whether gradients are whole.
        optim: the optimizer's settings.
        kind: of the device, `cpu` or `cuda`.
        num_parameters: elements of the model.
    """
    overlap = overlapped(train, kind)
    bf16, partitioned = precision_on(kind, train.precision) == "bf16", train.gradients == "partitioned"
    # Buckets are allocated at their full size: 2 GB by default, whatever the model's.
    bucket = min(LARGEST_BUCKET, num_parameters + num_parameters % 2)
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": 1,
        # Any number of backward passes, then step(): with whole gradients ranks may run different numbers of them. To
        # reduce whole gradients during the last of them, DeepSpeed has to be told which that is.
        "managed_gradient_accumulation": overlap and not partitioned,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": bf16, "check_grad_overflow": True} if bf16 else {"enabled": False},
        # Of partitioned ones; with whole ones DeepSpeed would take another wrapper, whose gradients are twice as large.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if partitioned else {}),
        "zero_optimization": {
            "stage": 2 if partitioned else 1,
            "overlap_comm": overlap,
            "round_robin_gradients": False,
            # A gradient goes to the rank that owns it and to no other: an all-reduce, the default, has twice the bytes.
            "use_multi_rank_bucket_allreduce": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "steps_per_print": None,
    }
