"""Reading intervals of tensors out of a snapshot, whatever world size it was taken at."""

from collections.abc import Callable, Container, Iterable

import numpy as np

from optim.layout import Fragment, copies
from workers.checkpoint.manifest import BUFFER
from workers.checkpoint.shards import CheckpointReader
from workers.common.errors import StorageError
from workers.common.wire import Address, Connection
from workers.snapshots.kept import KeptShard, ShardMap, Snapshot
from workers.snapshots.messages import Content, Read, RefusedError, answer, encode
from workers.snapshots.region import Region


class SnapshotReader:
    """Reads from this node's keeper where it can, from another's where it must.

    Args:
        snapshot: what to read.
        shard_map: `(world size, rank) -> ShardMap`, of the model that is being trained.
        ranks: whose parts are read; what the others have is not looked up.
        here: this node's keeper.
        checkpoint: of the same step, for what is in no keeper any more.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        shard_map: Callable[[int, int], ShardMap],
        ranks: Container[int],
        here: Address | None,
        checkpoint: CheckpointReader | None = None,
    ) -> None:
        self.snapshot, self.here, self.checkpoint = snapshot, here, checkpoint
        self._regions: dict[str, Region] = {}
        self._connections: dict[Address, Connection] = {}
        self._have: dict[str, list[tuple[int, Fragment]]] = {}
        best: dict[int, KeptShard] = {}
        for shard in sorted(snapshot.shards, key=lambda shard: shard.keeper == here):
            best[shard.rank] = shard
        agreed = next(shard for shard in reversed(list(best.values()) + list(snapshot.shards)) if shard.agreed)
        self._sources = [*(shard for rank, shard in best.items() if rank in ranks), agreed]
        for source, shard in enumerate(self._sources):
            last = source == len(self._sources) - 1
            for kind, fragment in shard_map(snapshot.world_size, shard.rank).fragments:
                if (kind == BUFFER) == last:  # What is replicated is read from an agreed copy alone.
                    self._have.setdefault(kind, []).append((source, fragment))

    def fill(self, kind: str, want: Iterable[Fragment], target: np.ndarray) -> None:
        """Fill the wanted fragments of the flat fp32 `target`.

        Raises:
            StorageError: an interval is in no copy, or its keeper is gone.
        """
        plan, missing = copies(self._have.get(kind, []), want)
        for copy in plan:
            place = target[copy.target_offset : copy.target_offset + copy.length]
            self._read(self._sources[copy.source], copy.source_offset, place)
        if self.checkpoint is not None:
            self.checkpoint.fill(kind, missing, target)
        elif missing:
            raise StorageError(f"snapshot of step {self.snapshot.step}: no {kind} of {missing[0]}")

    def close(self) -> None:
        """Let go of all keepers."""
        for connection in self._connections.values():
            connection.close()
        self._regions.clear()

    def _read(self, shard: KeptShard, offset: int, place: np.ndarray) -> None:
        if shard.keeper == self.here:
            if shard.path not in self._regions:
                self._regions[shard.path] = Region.attach(shard.path, shard.size)
            place[:] = self._regions[shard.path].floats(shard.half)[offset : offset + place.size]
            return
        if shard.keeper not in self._connections:
            self._connections[shard.keeper] = Connection.open(shard.keeper)
        connection = self._connections[shard.keeper]
        wanted = Read(path=shard.path, half=shard.half, step=shard.step, offset=offset, count=place.size)
        connection.send(encode(wanted))
        try:
            _, size = answer(connection, Content)
        except RefusedError as error:
            raise StorageError(f"keeper at {shard.keeper.host}: {error}") from error
        if size != place.nbytes:
            raise StorageError(f"keeper at {shard.keeper.host}: sent other bytes than asked for")
        connection.receive_into(place.view(np.uint8).data)
