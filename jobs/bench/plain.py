"""The same engine and step loop under plain torchrun, without Ray, driver or MLflow: the rival of `bench overhead`.

Started as `torchrun -m jobs.bench.plain CONFIG.yaml RUN_URL`; rank 0 prints as JSON when its steps ended (`times`)
and the last validation loss (`val_loss`).
"""

import sys
import time
from typing import Any

from torch.distributed import rendezvous

from jobs.load import load
from jobs.tell import tell
from orchestrator.config import absolute, task_of
from workers.controls import Controls
from workers.data.prepare import prepare
from workers.reports import Report, StepDone, Validated
from workers.task import Place
from workers.training import join, train


def main(config_path: str, run_url: str) -> None:
    """Train as one rank of a torchrun group."""
    config = absolute(load(config_path, []))
    store, rank, world_size = next(rendezvous("env://"))
    member = Place(generation=1, rank=rank, world_size=world_size, host="", port=0, keepers=False)
    task = task_of(config, prepare(config.data), run_url, attempt=1, manifest=None)
    times: list[float] = []
    losses: list[float] = []

    def report(kind: type[Report], **fields: Any) -> None:
        if kind is StepDone:
            times.append(time.time())
        if kind is Validated:
            losses.append(fields["loss"])

    engine = join(member, task, store)
    train(engine, task, member, Controls(report=report))
    if rank == 0:
        tell({"times": times, "val_loss": losses[-1]})
    engine.destroy()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
