"""A rank's part of a checkpoint on its way from a keeper to storage: tried several times, and told either way."""

import time
from collections.abc import Callable

from workers.checkpoint.manifest import ShardFile
from workers.reports import Report, SaveFailed, SaveRetried, ShardWritten

UPLOAD_TRIES = 4
UPLOAD_BACKOFF_S = 1.0
"""Before the second try; it doubles."""


def upload_shard(
    write: Callable[[], ShardFile],
    about: dict[str, int],
    world_size: int,
    counters: dict[str, int],
    shapes: dict[str, list[int]],
    tell: Callable[[Report], object],
) -> Report:
    """Write a shard, and return what the driver is to know of it.

    Args:
        write: puts it into storage.
        about: its `generation`, `rank` and `step`.
        world_size: ranks of the checkpoint.
        counters: of its step.
        shapes: of all tensors, from rank 0.
        tell: takes what is to be known meanwhile.
    """
    for tries in range(1, UPLOAD_TRIES + 1):
        try:
            shard = write()
            return ShardWritten(
                **about, time=time.time(), world_size=world_size, shard=shard, counters=counters, shapes=shapes
            )
        except Exception as error:  # Whatever it is, the driver has to know that this shard will not come.
            if tries == UPLOAD_TRIES:
                return SaveFailed(**about, time=time.time(), error=str(error))
            tell(SaveRetried(**about, time=time.time(), error=str(error)))
            time.sleep(UPLOAD_BACKOFF_S * 2 ** (tries - 1))
    raise AssertionError
