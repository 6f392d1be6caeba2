"""The worker as a Ray actor: the only file of this room that knows Ray."""

import os

import ray

from workers.member import Member


def see_own_gpus() -> None:
    """Hide from this process the GPUs that it has not reserved.

    Ray does not where none is reserved, nor where it is told not to (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES).
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, ray.get_gpu_ids()))


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker(Member):
    """A slot of the worker group."""

    def __init__(self) -> None:
        see_own_gpus()
        super().__init__(ray.util.get_node_ip_address())
