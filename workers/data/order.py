"""The order of the data: pure functions of the seed and the global sample index, whatever the world size.

A sample's index says which source it comes from (the mixture) and which of the source's samples it is (a permutation of
its own for each source and epoch). Both are computed point by point, so there is no list to keep, to save or to send,
a resumed run goes on from a number, and sample 10^12 costs what sample 0 does.

Invariants: each sample of a source comes once in an epoch; at every index the samples that a source has given are
within one of its share; other weights from a later index on move nothing before it.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np

ROUNDS = 4
"""Luby and Rackoff: four rounds of a pseudorandom function make a pseudorandom permutation."""
TABLE_BITS = 16
"""Halves of up to so many bits have their round functions in tables: a quarter of a second to make, half a megabyte."""
BLOCKS = 64
"""In a window."""


def random_seed(seed: int, step: int, slot: int) -> int:
    """Return the seed of all randomness inside a slot's forward pass, whichever rank computes it."""
    return int.from_bytes(blake2b(b"%d,%d,%d" % (seed, step, slot), digest_size=7).digest(), "little")


def slots_of_rank(slots: int, world_size: int, rank: int) -> range:
    """Return the slots that a rank computes: contiguous, and at most one more than any other rank's."""
    return range(rank * slots // world_size, (rank + 1) * slots // world_size)


def most_slots(slots: int, world_size: int) -> int:
    """Return what the rank with most of the slots runs; one without any runs one in which nothing counts."""
    return max(1, max(len(slots_of_rank(slots, world_size, rank)) for rank in range(world_size)))


class Permutation:
    """A permutation of `range(size)`, computed point by point: a Feistel network, walked until it lands inside.

    Args:
        key: of the round functions; another key is another permutation.
        size: at least 1.
    """

    def __init__(self, key: bytes, size: int) -> None:
        self.key, self.size = key, size
        self.half_bits = max(1, (size - 1).bit_length() + 1 >> 1)
        self._tables: list[np.ndarray] | None = None
        if self.half_bits <= TABLE_BITS:
            halves = range(1 << self.half_bits)
            self._tables = [
                np.array([self._scramble(round_, half) for half in halves], np.int64) for round_ in range(ROUNDS)
            ]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return where positions, int64 within the range, lead."""
        found = self._step(positions)
        outside = found >= self.size
        while outside.any():
            found[outside] = self._step(found[outside])
            outside = found >= self.size
        return found

    def _step(self, positions: np.ndarray) -> np.ndarray:
        left, right = positions >> self.half_bits, positions & ((1 << self.half_bits) - 1)
        for round_ in range(ROUNDS):
            if self._tables is not None:
                scrambled = self._tables[round_][right]
            else:
                scrambled = np.array([self._scramble(round_, half) for half in right.tolist()], np.int64)
            left, right = right, left ^ scrambled
        return left << self.half_bits | right

    def _scramble(self, round_: int, half: int) -> int:
        digest = blake2b(b"%b,%d,%d" % (self.key, round_, half), digest_size=8).digest()
        return int.from_bytes(digest, "little") & ((1 << self.half_bits) - 1)


_permutation = lru_cache(maxsize=64)(Permutation)


def shuffled(key: bytes, size: int, window: int, positions: np.ndarray) -> np.ndarray:
    """Return which samples of a source stand at positions of an epoch.

    With a window the order is random in two steps, so that samples that are read one after another lie near each other:
    blocks of neighbouring samples in a random order, and the samples of each BLOCKS blocks in a random order::

        samples   0 1 2 | 3 4 5 | 6 7 8 | 9 10 11 | 12        blocks of 3, and a rest
        blocks    6 7 8 | 0 1 2 | 9 10 11 | 3 4 5 | 12        the rest stays at the end
        windows   1 8 6 0 7 2   |  10 4 9 12 11 3 5           of 2 blocks; the last has the rest, too

    Args:
        key: of the source, the seed and the epoch.
        size: samples of the source.
        window: samples of a window; 0, or not less than all: one order of all of them.
        positions: int64, each within the size.
    """
    if not 0 < window < size:
        return _permutation(key, size)(positions)
    block = max(1, window // BLOCKS)
    per_window, num_blocks = block * BLOCKS, size // block
    num_windows = max(1, num_blocks // BLOCKS)  # What is left over goes into the last one.
    windows = np.minimum(positions // per_window, num_windows - 1)
    within = np.empty_like(positions)
    for number in np.unique(windows).tolist():
        first = number * per_window
        rows = windows == number
        length = size - first if number == num_windows - 1 else per_window
        within[rows] = first + _permutation(b"%b,w%d" % (key, number), length)(positions[rows] - first)
    blocks, offsets = within // block, within % block
    full = blocks < num_blocks
    found = within.copy()  # The rest, where it is.
    found[full] = _permutation(b"%b,b" % key, num_blocks)(blocks[full]) * block + offsets[full]
    return found


class Mixture:
    """Which source each sample comes from, in a period of as many samples as there are shares.

    At every prefix each source is within one sample of its share. That is Tijdeman's chairman assignment problem (1980,
    "The chairman assignment problem"): of the sources that may take the next sample without being a whole one ahead,
    the one that would be a whole one behind soonest takes it.

    Args:
        shares: whole numbers, one or more above 0; the period is their sum.
    """

    def __init__(self, shares: tuple[int, ...]) -> None:
        self.shares, self.period = np.array(shares, np.int64), sum(shares)
        self.source, self.rank = np.zeros(self.period, np.int32), np.zeros(self.period, np.int64)
        num_sources = sum(share > 0 for share in shares)
        if num_sources == 1:
            self.source[:] = int(np.argmax(self.shares))
            self.rank[:] = np.arange(self.period)
            return
        # In units of 1 / (2 (sources - 1)) of a sample: nobody is ahead by more than all of a sample but one of them.
        unit = 2 * (num_sources - 1)
        waiting = [(self._release(share, 0, unit), source) for source, share in enumerate(shares) if share]
        heapq.heapify(waiting)
        ready: list[tuple[int, int]] = []
        given = [0] * len(shares)
        for index in range(self.period):
            while waiting and waiting[0][0] <= index:
                _, source = heapq.heappop(waiting)
                heapq.heappush(ready, (self._deadline(shares[source], given[source], unit), source))
            _, source = heapq.heappop(ready)
            self.source[index], self.rank[index] = source, given[source]
            given[source] += 1
            if given[source] < shares[source]:
                heapq.heappush(waiting, (self._release(shares[source], given[source], unit), source))

    def _release(self, share: int, given: int, unit: int) -> int:
        """Return the first index at which a source may give one more: then it has at most 1 - 1/unit too many."""
        return max(0, -(-((unit * given + 1) * self.period) // (unit * share)) - 1)

    def _deadline(self, share: int, given: int, unit: int) -> int:
        """Return the last index at which it has to, so that it lacks at most 1 - 1/unit."""
        return (unit * given + unit - 1) * self.period // (unit * share)

    def at(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each index, and how many samples it has given before."""
        periods, within = np.divmod(indices, self.period)
        source = self.source[within]
        return source, periods * self.shares[source] + self.rank[within]

    def before(self, index: int) -> np.ndarray:
        """Return how many samples each source has given before an index, int64 `[sources]`."""
        periods, within = divmod(index, self.period)
        return periods * self.shares + np.bincount(self.source[:within], minlength=len(self.shares))


_mixture = lru_cache(maxsize=16)(Mixture)


@dataclass(frozen=True)
class Drawn:
    """Samples of a run, in the order of their indices; arrays of one length."""

    source: np.ndarray
    """Number of the source."""
    sample: np.ndarray
    """Number of the sample in its source, from 0."""
    epoch: np.ndarray
    """How often all of the source was read before."""


class Order:
    """The order of a run's samples.

    Args:
        seed: of the run.
        sources: name and number of samples of each.
        stages: the first index of each mixture, rising from 0, and the share of each source in it.
        window: samples of a source among which the order is random; 0: all.
    """

    def __init__(
        self,
        seed: int,
        sources: Sequence[tuple[str, int]],
        stages: Sequence[tuple[int, tuple[int, ...]]] = ((0, (1,)),),
        window: int = 0,
    ) -> None:
        self.seed, self.sources, self.window = seed, list(sources), window
        self._firsts = np.array([first for first, _ in stages], np.int64)
        self._mixtures = [_mixture(tuple(shares)) for _, shares in stages]
        given = np.zeros(len(self.sources), np.int64)
        self._given = [given]
        """What each source has given before a stage."""
        for number in range(len(stages) - 1):
            given = given + self._mixtures[number].before(int(self._firsts[number + 1] - self._firsts[number]))
            self._given.append(given)

    def at(self, indices: np.ndarray) -> Drawn:
        """Return the samples of indices, int64 from 0."""
        indices = np.asarray(indices, np.int64)
        source, position = np.empty(len(indices), np.int64), np.empty(len(indices), np.int64)
        stages = np.searchsorted(self._firsts, indices, side="right") - 1
        for stage in np.unique(stages).tolist():
            rows = stages == stage
            source[rows], counted = self._mixtures[stage].at(indices[rows] - self._firsts[stage])
            position[rows] = self._given[stage][source[rows]] + counted
        sizes = np.array([size for _, size in self.sources], np.int64)[source]
        epoch, place = np.divmod(position, sizes)
        sample = np.empty_like(place)
        for number in np.unique(source).tolist():
            for turn in np.unique(epoch[source == number]).tolist():
                rows = (source == number) & (epoch == turn)
                key, size = self._key(number, turn), self.sources[number][1]
                sample[rows] = shuffled(key, size, self.window, place[rows])
        return Drawn(source, sample, epoch)

    def drawn(self, index: int) -> np.ndarray:
        """Return how many samples each source has given before an index, int64 `[sources]`."""
        stage = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self._given[stage] + self._mixtures[stage].before(index - int(self._firsts[stage]))

    def _key(self, source: int, epoch: int) -> bytes:
        name = self.sources[source][0]
        return b"%d,%d" % (self.seed, epoch) + (b"," + name.encode().hex().encode() if name else b"")
