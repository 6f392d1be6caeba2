"""The decisions of the worker group, as pure functions and small state machines: no Ray, no clock of their own."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.config import RecoveryConfig, ScalingConfig
from orchestrator.record.events import FaultSeen, Source
from workers.checkpoint.manifest import Manifest
from workers.common.errors import ConfigError, RaymuonError, StorageError, TrainingError
from workers.reports import Ended
from workers.snapshots.kept import KeptShard, Snapshot

FaultKind = Literal["failure", "preemption", "storage"]
NAMES: dict[FaultKind, str] = {"failure": "failures", "preemption": "preemptions", "storage": "storage failures"}


# -- who trains --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that is ready; `number` counts the workers of a run in the order of their start."""

    number: int
    node: str


def choose_members(ready: Iterable[Candidate], members: Iterable[int], scaling: ScalingConfig) -> list[int] | None:
    """Return who trains next, in rank order, or None if they are too few.

    Present members stay, then the oldest come: up to `max_workers`; the others stand by. Ranks go node by node, so that
    neighbours in the ring are on one node where they can be.
    """
    staying = set(members)
    by_seniority = sorted(ready, key=lambda worker: (worker.number not in staying, worker.number))
    chosen = by_seniority[: scaling.max_workers]
    if len(chosen) < scaling.min_workers:
        return None
    return [worker.number for worker in sorted(chosen, key=lambda worker: (worker.node, worker.number))]


def should_grow(num_members: int, num_spare: int, num_starting: int, waited_s: float, scaling: ScalingConfig) -> bool:
    """Tell whether to stop at the next boundary and take spare workers in.

    Those that are about to be ready are waited for, up to `settle_s`: one change for all of them.
    """
    if num_members >= scaling.max_workers or not num_spare:
        return False
    return num_starting == 0 or num_members + num_spare >= scaling.max_workers or waited_s >= scaling.settle_s


def buddies(nodes: Iterable[str]) -> dict[str, str | None]:
    """Return for each node the next one in the ring, which keeps a copy of its snapshots; None for a single node."""
    ring = sorted(set(nodes))
    return {node: ring[(i + 1) % len(ring)] if len(ring) > 1 else None for i, node in enumerate(ring)}


# -- what to go on from ------------------------------------------------------------------------------------------------


def newest_snapshot(kept: Iterable[KeptShard], saved: tuple[int, int]) -> Snapshot | None:
    """Return the newest snapshot of which every rank's part has a live copy, or is in storage.

    A part that is only sealed counts if any rank has agreed on that step: then every rank had come through it. A later
    generation comes first: an older one's state is of a past that was given up.

    Args:
        kept: what the keepers have.
        saved: generation and step of the snapshot that has become the newest checkpoint.
    """
    found: dict[tuple[int, int, int], list[KeptShard]] = {}
    for shard in kept:
        found.setdefault((shard.generation, shard.step, shard.world_size), []).append(shard)
    for generation, step, world_size in sorted(found, reverse=True):
        shards = found[generation, step, world_size]
        agreed = next((shard for shard in shards if shard.agreed), None)
        whole = {shard.rank for shard in shards} == set(range(world_size))
        if agreed and (whole or (generation, step) == saved):
            return Snapshot(
                generation=generation,
                step=step,
                world_size=world_size,
                counters=agreed.notes["counters"],
                shards=tuple(shards),
                saved=not whole,
            )
    return None


@dataclass(frozen=True, slots=True)
class Restart:
    """What a generation goes on from."""

    source: Source
    step: int
    snapshot: Snapshot | None = None
    """In the keepers' memory; without one it is the checkpoint, or the start."""


def restart(snapshot: Snapshot | None, manifest: Manifest | None) -> Restart:
    """Return what is newer, the snapshot where both are of one step: no storage has to be read."""
    if snapshot is not None and (manifest is None or snapshot.step >= manifest.step):
        return Restart("keepers and storage" if snapshot.saved else "keepers", snapshot.step, snapshot)
    return Restart("storage", manifest.step) if manifest is not None else Restart("start", 0)


# -- what has happened -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a generation has ended before its time."""

    seen: FaultSeen
    cause: str
    """For people."""
    ranks: tuple[int, ...]
    began: float
    """Seconds since the epoch; when it was found where nobody knows better."""
    kind: FaultKind = "failure"
    error: RaymuonError | None = None
    """Trying again would not help: the run ends with this."""


def diagnose(ended: dict[int, Ended], gone: dict[int, str], nodes: Sequence[str], found_at: float) -> Diagnosis:
    """Tell a cause from what it led to: an error of a rank's own comes before deaths, those before lost peers.

    Args:
        ended: how ranks have left.
        gone: why ranks had to be given up.
        nodes: by rank.
        found_at: when the generation was found to be over, in seconds since the epoch.
    """
    failed = {rank: end for rank, end in ended.items() if end.outcome == "failed"}
    if failed:
        first = min(failed.values(), key=lambda end: (end.exit_code == 0, end.time))
        cause = f"rank {first.rank}: {first.error}"
        fatal = {error.exit_code: error for error in (ConfigError, TrainingError)}.get(first.exit_code)
        kind: FaultKind = "storage" if first.exit_code == StorageError.exit_code else "failure"
        return Diagnosis("error", cause, tuple(failed), first.time, kind, fatal and fatal(cause))
    if gone:
        rank, reason = next(iter(gone.items()))
        return Diagnosis("killed", f"rank {rank} on node {nodes[rank][:8]}: {reason}", tuple(gone), found_at)
    if lost := [end for end in ended.values() if end.outcome == "lost"]:
        first = min(lost, key=lambda end: end.time)
        return Diagnosis("lost", f"rank {first.rank}: {first.error}", (first.rank,), first.time)
    return Diagnosis("lost", "the last checkpoint went with its keeper", (), found_at)


# -- whether to go on --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GoOn:
    """Recover, after a pause."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the run."""

    error: RaymuonError


def backoff(first_s: float, most_s: float, times: int) -> float:
    """Return `first_s`, doubled so many times, but no more than `most_s`.

    A run of weeks counts further than the exponent of a float goes.
    """
    return min(first_s * 2 ** min(times, 64), most_s)


_VARIABLE = re.compile(r"0x[0-9a-f]+|\[[0-9a-f:.]*:[0-9a-f:.]*\]|[0-9a-f]{16,}|\d+(\.\d+)*", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"out.?of.?memory|MemoryError|can't allocate memory|cannot allocate memory|unable to allocate|bad_alloc"
    r"|failed to allocate|ALLOC_FAILED|memory allocation",
    re.IGNORECASE,
)


def same_failure(cause: str) -> str:
    """Return what two causes share that are one failure: no rank, address, port, size, id or time; the node's name."""
    return " ".join(_VARIABLE.sub("#", cause).split())


def lacks_memory(cause: str) -> bool:
    """Tell whether a failure is an allocation that was refused, or a process that Ray has killed for its memory."""
    return _NO_MEMORY.search(cause) is not None


@dataclass
class FailurePolicy:
    """Budgets for faults, and back-off.

    Each kind has a budget of its own within a sliding hour: nodes that come and go must not use up what is meant for
    bugs. The first fault after progress is recovered from at once; each further one without progress waits longer. A
    step that kills the group again and again is poison: the same data and state will do the same once more. What comes
    again and again before this driver has seen any step is no fault but a setting, or a machine that is too small.
    """

    config: RecoveryConfig
    faults: dict[FaultKind, list[float]] = field(default_factory=dict)
    killers: Counter[int] = field(default_factory=Counter)
    in_a_row: int = 0
    failed_saves: int = 0
    stepped: bool = False
    """Whether any step was finished since the driver began."""
    early: Counter[str] = field(default_factory=Counter)
    """Failures before that, by what they share."""

    def fault(self, kind: FaultKind, cause: str, now: float, step: int | None = None) -> GoOn | GiveUp:
        """Decide what a fault leads to.

        Args:
            kind: whose budget it takes from.
            cause: for people.
            now: seconds, of any clock that does not jump.
            step: the step in which the group was; None if it was not in one (a fault while it recovered, or after the
                last step).
        """
        recent = [at for at in self.faults.get(kind, []) if at > now - WINDOW_S] + [now]
        self.faults[kind] = recent
        if kind == "failure" and not self.stepped and (end := self._early(cause)):
            return end
        if kind == "failure" and step is not None:
            self.killers[step] += 1
            if self.killers[step] >= self.config.poison_after:
                return GiveUp(
                    TrainingError(
                        f"step {step} is poison: it has ended the group {self.killers[step]} times, the last time by "
                        f"{cause}; look at the data of this step, or raise recovery.poison_after "
                        f"({self.config.poison_after})"
                    )
                )
        budget = self.config.budget(kind)
        if budget is not None and len(recent) > budget:
            error = StorageError if kind == "storage" else TrainingError
            return GiveUp(
                error(
                    f"{cause}; {len(recent)} {NAMES[kind]} within an hour are more than "
                    f"recovery.max_{NAMES[kind].replace(' ', '_')}={budget}"
                )
            )
        self.in_a_row += 1
        if kind == "failure" and self.in_a_row > self.config.max_in_a_row:
            return GiveUp(
                TrainingError(
                    f"{cause}; that is the {self.in_a_row}. failure without a new step in between, "
                    f"recovery.max_in_a_row={self.config.max_in_a_row}"
                )
            )
        if kind == "preemption" or self.in_a_row <= self.config.free_retries:
            return GoOn(0.0)
        exponent = self.in_a_row - self.config.free_retries - 1
        return GoOn(backoff(self.config.backoff_s, self.config.max_backoff_s, exponent))

    def _early(self, cause: str) -> GiveUp | None:
        """Note a failure before the first step; return the end of the run where it will only come again."""
        same = same_failure(cause)
        self.early[same] += 1
        if lacks_memory(cause) and self.early[same] >= 2:
            mend = "raymuon plan tells what is needed; lower train.micro_batch or the model's sizes"
        elif self.early[same] >= self.config.poison_after:
            mend = f"mend its cause, or raise recovery.poison_after ({self.config.poison_after})"
            if cause.endswith("its process died"):
                mend += "; a system that lacks memory kills like that (raymuon plan tells what is needed)"
        else:
            return None
        return GiveUp(TrainingError(f"the same failure {self.early[same]} times before any step: {cause}; {mend}"))

    def progressed(self) -> None:
        """Note a new finished step."""
        self.in_a_row, self.stepped = 0, True

    def save_failed(self, cause: str) -> GiveUp | None:
        """Note that a checkpoint could not be written; return the end of the run if it was one too many in a row."""
        self.failed_saves += 1
        if self.failed_saves <= self.config.max_failed_saves:
            return None
        return GiveUp(
            StorageError(
                f"{cause}; that is the {self.failed_saves}. checkpoint in a row that could not be written, "
                f"recovery.max_failed_saves={self.config.max_failed_saves}"
            )
        )

    def saved(self) -> None:
        """Note that a checkpoint counts."""
        self.failed_saves = 0


WINDOW_S = 3600.0
