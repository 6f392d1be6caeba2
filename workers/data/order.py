"""The order of the data: pure functions of the seed and the global sample index, whatever the world size.

Epoch e reads every sample once, in a permutation of its own. The permutation is computed point by point (a Feistel
network, walked until it lands inside the range), so there is no list to keep, to save or to send, and a resumed run
goes on from a number.
"""

from hashlib import blake2b

ROUNDS = 4
"""Luby and Rackoff: four rounds of a pseudorandom function make a pseudorandom permutation."""


def sample_at(seed: int, index: int, num_samples: int) -> int:
    """Return which sample of the corpus is the `index`-th (from 0) of the run."""
    epoch, position = divmod(index, num_samples)
    half_bits = max(1, (num_samples - 1).bit_length() + 1 >> 1)
    mask = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & mask
        for round_ in range(ROUNDS):
            key = b"%d,%d,%d,%d" % (seed, epoch, round_, right)
            left, right = right, left ^ (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") & mask)
        position = left << half_bits | right
        if position < num_samples:
            return position


def random_seed(seed: int, step: int, slot: int) -> int:
    """Return the seed of all randomness inside a slot's forward pass, whichever rank computes it."""
    return int.from_bytes(blake2b(b"%d,%d,%d" % (seed, step, slot), digest_size=7).digest(), "little")


def samples_of_slot(
    seed: int, step: int, slot: int, global_batch: int, micro_batch: int, num_samples: int
) -> list[int]:
    """Return the corpus samples of one micro-batch slot of `step` (1 is the first)."""
    first = (step - 1) * global_batch + slot * micro_batch
    return [sample_at(seed, index, num_samples) for index in range(first, first + micro_batch)]


def slots_of_rank(slots: int, world_size: int, rank: int) -> range:
    """Return the slots that a rank computes: contiguous, and at most one more than any other rank's."""
    return range(rank * slots // world_size, (rank + 1) * slots // world_size)
