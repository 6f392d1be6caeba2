"""The worker as a Ray actor: the only file of this room that knows Ray."""

import os

import ray

from workers.member import Member


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker(Member):
    """A slot of the worker group."""

    def __init__(self) -> None:
        if not ray.get_gpu_ids():  # Ray does not hide the GPUs of a node from a worker that reserved none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        super().__init__(ray.util.get_node_ip_address())
