"""The order of the data: pure functions of the seed and the global sample index, whatever the world size.

Which source a sample comes from is read off a periodic table of the sources' shares, and which of its samples off a
permutation that every epoch of every source has of its own. The permutation is computed point by point (a Feistel
network, walked until it lands inside the range), so there is no list to keep, to save or to send: sample 10^12 costs
what sample 0 costs, and a resumed run goes on from a number.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from math import gcd

import numpy as np

from workers.common.errors import ConfigError

ROUNDS = 4
"""Luby and Rackoff: four rounds of a pseudorandom function make a pseudorandom permutation."""
TABULATED_BITS = 16
"""Of half a position: up to 2^32 samples the function's values are kept (a MiB at most), of more they are not."""
PERMUTATIONS = 64
"""Whose values are kept."""
ARRAY = 16
"""Positions from which on numpy is faster than one after the other."""
WINDOW_BLOCKS = 64
"""Of neighbouring samples, that lie in a window."""


@dataclass(frozen=True)
class Drawn:
    """Where samples of the run come from; arrays of int64."""

    source: np.ndarray
    """Number of the source."""
    sample: np.ndarray
    """Number of the sample in it."""
    epoch: np.ndarray
    """How often the source had been read whole before."""


class Order:
    """The samples of a run.

    With a window, a source is read so that the samples that come near each other in the run lie in few places, which
    is what an object store and a cache before it want:

        the source          0 1 2 | 3 4 5 | 6 7 8 | 9 ...           blocks of window // 64 samples
        its blocks, mixed   6 7 8 | 0 1 2 | 9 ...                   a permutation of each epoch; a short last one stays
        64 of them          [6 7 8   0 1 2   9 ...   ] [ ...        a window
        mixed in it         [1 9 8   6 0 ...         ] [ ...        a permutation of each window

    Each sample still comes once an epoch. A window of less than 64 samples counts as 64, and one in which the source
    has room as none.

    Args:
        seed: of the run.
        sources: name and number of samples of each. The order within a source depends on its name and not on its
            place. A run with one source without a name has the order that all runs had before there were names.
        stages: the first global sample index of each, rising from 0, and the sources' integer shares from there on.
        window: samples of a source among which the order is random; 0: all of it.

    Raises:
        ConfigError: a source that is drawn from has no sample.
        ValueError: these are no sources and stages.
    """

    def __init__(
        self,
        seed: int,
        sources: Sequence[tuple[str, int]],
        stages: Sequence[tuple[int, Sequence[int]]],
        window: int = 0,
    ) -> None:
        firsts = [first for first, _ in stages]
        if firsts[:1] != [0] or firsts != sorted(set(firsts)):
            raise ValueError(f"the stages' first samples must rise from 0, not {firsts}")
        if len({name for name, _ in sources}) != len(sources):
            raise ValueError(f"two sources of one name: {[name for name, _ in sources]}")
        for _, shares in stages:
            if len(shares) != len(sources) or min(shares) < 0 or not any(shares):
                raise ValueError(f"{len(sources)} source(s) cannot have the shares {list(shares)}")
        for (name, size), *shares in zip(sources, *(shares for _, shares in stages), strict=True):
            if size < 1 and any(shares):
                raise ConfigError(
                    f"data.sources: {name or 'the source'} has no training sample; give it more text, lower "
                    "train.seq_len, or set its weight to 0"
                )
        self.seed, self.window = seed, window
        self._sources = [_Source(seed, name, size, window) for name, size in sources]
        self._firsts = np.array(firsts, np.int64)
        self._stages: list[tuple[_Mixture, np.ndarray]] = []
        drawn = np.zeros(len(sources), np.int64)
        for number, (first, shares) in enumerate(stages):
            mixture = _mixture(tuple(shares))
            self._stages.append((mixture, drawn))
            if number + 1 < len(stages):
                drawn = drawn + mixture.counts(firsts[number + 1] - first)

    def at(self, indices: np.ndarray) -> Drawn:
        """Return where the run's samples of these global indices (from 0) come from."""
        indices = np.asarray(indices, np.int64)
        source, count = np.empty_like(indices), np.empty_like(indices)
        for stage, where in _groups(np.searchsorted(self._firsts, indices, "right") - 1):
            mixture, before = self._stages[stage]
            source[where], within = mixture.at(indices[where] - self._firsts[stage])
            count[where] = within + before[source[where]]
        sample, epoch = np.empty_like(indices), np.empty_like(indices)
        for number, where in _groups(source):
            sample[where], epoch[where] = self._sources[number].at(count[where])
        return Drawn(source, sample, epoch)


class _Mixture:
    """A period of as many samples as the shares' sum, in which at every prefix each source has its share, but for one.

    That such an order exists, and that it suffices to take at each place, of the sources whose turn has come, the one
    that must be served first, is Tijdeman's (The chairman assignment problem, Discrete Mathematics 32, 1980). The k-th
    sample (from 0) of a source of share s out of D lies after place floor(k D / s) and not after ceil((k + 1) D / s).
    """

    def __init__(self, shares: tuple[int, ...]) -> None:
        self.shares = np.array(shares, np.int64)
        self.period = int(self.shares.sum())
        self.source = np.empty(self.period, np.int32)
        self.rank = np.empty(self.period, np.int32)
        begins, ends = [], []
        for number, share in enumerate(shares):
            turns = np.arange(share, dtype=np.int64) * self.period
            begins.append(turns // max(share, 1))
            ends.append(-(-(turns + self.period) // max(share, 1)) * len(shares) + number)
        begin, end = np.concatenate(begins), np.concatenate(ends)
        sequence = np.argsort(begin, kind="stable")
        due, at = iter(end[sequence].tolist()), 0
        released = np.searchsorted(begin[sequence], np.arange(self.period), "right").tolist()
        waiting: list[int] = []
        order = []
        for until in released:
            while at < until:
                heapq.heappush(waiting, next(due))
                at += 1
            order.append(heapq.heappop(waiting))
        self.source[:] = np.array(order, np.int64) % len(shares)
        for number in range(len(shares)):
            places = np.flatnonzero(self.source == number)
            self.rank[places] = np.arange(len(places))

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at each place, and how many of its samples came before."""
        periods, place = np.divmod(places, self.period)
        source = self.source[place]
        return source, periods * self.shares[source] + self.rank[place]

    def counts(self, places: int) -> np.ndarray:
        """Return how many samples of each source the first places have."""
        periods, rest = divmod(places, self.period)
        return periods * self.shares + np.bincount(self.source[:rest], minlength=len(self.shares))


@lru_cache(8)
def _shared_mixture(shares: tuple[int, ...]) -> _Mixture:
    return _Mixture(shares)


def _mixture(shares: tuple[int, ...]) -> _Mixture:
    unit = gcd(*shares)
    return _shared_mixture(tuple(share // unit for share in shares))


class _Source:
    """The order within a source."""

    def __init__(self, seed: int, name: str, size: int, window: int) -> None:
        # With its length before it, no name can be taken for another one and what follows.
        spelled = name.encode()
        self.seed, self.size = seed, size
        self.key = b"%d:%s," % (len(spelled), spelled) if name else b""
        self.block = max(1, window // WINDOW_BLOCKS) if 0 < window < size else 0

    def at(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample that comes after so many of this source, and its epoch."""
        epochs, places = np.divmod(counts, self.size)
        samples = np.empty_like(places)
        for epoch, where in _groups(epochs):
            of_epoch = self._in_windows if self.block else self._whole
            samples[where] = of_epoch(epoch, places[where])
        return samples, epochs

    def _whole(self, epoch: int, places: np.ndarray) -> np.ndarray:
        return permuted(self.key, self.seed, epoch, self.size, places)

    def _in_windows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Undo the figure from below: out of the window into its blocks, and out of these into the source."""
        length, full = self.block * WINDOW_BLOCKS, self.size // self.block
        windows, places = np.divmod(places, length)
        for window, where in _groups(windows):
            key, size = self.key + b"window %d," % window, min(length, self.size - window * length)
            places[where] = permuted(key, self.seed, epoch, size, places[where]) + window * length
        blocks, offsets = np.divmod(places, self.block)
        whole = blocks < full
        blocks[whole] = permuted(self.key + b"blocks,", self.seed, epoch, full, blocks[whole])
        return blocks * self.block + offsets


def _groups(values: np.ndarray) -> Iterator[tuple[int, np.ndarray | slice]]:
    """Yield each value that there is, and where it is."""
    if not values.size:
        return
    if values[0] == values[-1] and (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    sequence = np.argsort(values, kind="stable")
    ordered = values[sequence]
    borders = np.flatnonzero(np.diff(ordered)) + 1
    for where in np.split(sequence, borders):
        yield int(values[where[0]]), where


def permuted(key: bytes, seed: int, epoch: int, size: int, positions: np.ndarray) -> np.ndarray:
    """Return where a permutation of `size` numbers takes positions.

    Args:
        key: of what is permuted, beside the seed and the epoch.
        seed: of the run.
        epoch: of the source.
        size: how many numbers.
        positions: int64, from 0 and below `size`.
    """
    if _half_bits(size) > TABULATED_BITS or len(positions) < ARRAY:
        return np.array([_walk(key, seed, epoch, size, position) for position in positions.tolist()], np.int64)
    return _permutation(key, seed, epoch, size).at(positions)


def _half_bits(size: int) -> int:
    """Return the bits of half a number of the network, which has up to four times as many numbers as are permuted."""
    return max(1, (size - 1).bit_length() + 1 >> 1)


def _round(key: bytes, seed: int, epoch: int, round_: int, right: int) -> int:
    message = key + b"%d,%d,%d,%d" % (seed, epoch, round_, right)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little")


def _walk(key: bytes, seed: int, epoch: int, size: int, position: int) -> int:
    """Go through the network until it lands inside the range."""
    half_bits = _half_bits(size)
    mask = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & mask
        for round_ in range(ROUNDS):
            left, right = right, left ^ (_round(key, seed, epoch, round_, right) & mask)
        position = left << half_bits | right
        if position < size:
            return position


class _Permutation:
    """The same for arrays. The rounds' values are kept, each when it is first needed: nobody waits for them at once."""

    def __init__(self, key: bytes, seed: int, epoch: int, size: int) -> None:
        self.of, self.size, self.half_bits = (key, seed, epoch), size, _half_bits(size)
        self.values = np.full((ROUNDS, 1 << self.half_bits), -1, np.int32)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return where it takes positions."""
        mask = (1 << self.half_bits) - 1
        found, outside, walked = np.empty_like(positions), np.arange(len(positions)), positions
        while outside.size:
            left, right = walked >> self.half_bits, walked & mask
            for round_ in range(ROUNDS):
                left, right = right, left ^ self._round(round_, right)
            walked = left << self.half_bits | right
            inside = walked < self.size
            found[outside[inside]] = walked[inside]
            outside, walked = outside[~inside], walked[~inside]
        return found

    def _round(self, round_: int, right: np.ndarray) -> np.ndarray:
        values = self.values[round_]
        found = values[right]
        if found.min() < 0:
            mask = (1 << self.half_bits) - 1
            for number in np.unique(right[found < 0]).tolist():
                values[number] = _round(*self.of, round_, number) & mask
            found = values[right]
        return found


@lru_cache(PERMUTATIONS)
def _permutation(key: bytes, seed: int, epoch: int, size: int) -> _Permutation:
    return _Permutation(key, seed, epoch, size)


def sample_at(seed: int, index: int, num_samples: int) -> int:
    """Return which sample of a corpus of one source without a name is the `index`-th (from 0) of the run."""
    epoch, position = divmod(index, num_samples)
    return _walk(b"", seed, epoch, num_samples, position)


def random_seed(seed: int, step: int, slot: int) -> int:
    """Return the seed of all randomness inside a slot's forward pass, whichever rank computes it."""
    return int.from_bytes(blake2b(b"%d,%d,%d" % (seed, step, slot), digest_size=7).digest(), "little")


def indices_of_slot(step: int, slot: int, global_batch: int, micro_batch: int) -> np.ndarray:
    """Return the global sample indices of one micro-batch slot of `step` (1 is the first)."""
    first = (step - 1) * global_batch + slot * micro_batch
    return np.arange(first, first + micro_batch, dtype=np.int64)


def samples_of_slot(
    seed: int, step: int, slot: int, global_batch: int, micro_batch: int, num_samples: int
) -> list[int]:
    """Return the samples of one micro-batch slot of `step`, out of a corpus of one source without a name."""
    indices = indices_of_slot(step, slot, global_batch, micro_batch)
    return [sample_at(seed, index, num_samples) for index in indices.tolist()]


def slots_of_rank(slots: int, world_size: int, rank: int) -> range:
    """Return the slots that a rank computes: contiguous, and at most one more than any other rank's."""
    return range(rank * slots // world_size, (rank + 1) * slots // world_size)
