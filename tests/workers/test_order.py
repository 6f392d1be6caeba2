"""The order of samples: bijections, exact mixtures, and borders that move nothing before them."""

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.config import OptimConfig
from workers.data.order import BLOCKS, ROUNDS, Mixture, Order, Permutation, random_seed, shuffled, slots_of_rank
from workers.feed import indices_of_slot
from workers.recipe import Recipe, TrainConfig


def plain(key: bytes, index: int, size: int) -> int:
    """The network, number by number, as runs of the first version read their samples."""
    half_bits = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_ in range(ROUNDS):
            digest = blake2b(b"%b,%d,%d" % (key, round_, right), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half_bits | right
        if index < size:
            return index


def whole_epoch(order: Order, epoch: int, size: int) -> np.ndarray:
    return order.at(np.arange(epoch * size, (epoch + 1) * size)).sample


@given(st.integers(0, 5), st.integers(1, 3000), st.integers(0, 3), st.sampled_from([0, 1, 63, 64, 200]))
def test_every_epoch_reads_every_sample_once(seed, size, epoch, window):
    assert sorted(whole_epoch(Order(seed, [("", size)], window=window), epoch, size)) == list(range(size))


@settings(max_examples=10)
@given(st.integers(0, 2**63 - 1), st.integers(1, 10**6), st.sampled_from([0, 5000, 65_536]))
def test_large_ones_too_and_with_a_window(seed, size, window):
    seen = np.zeros(size, bool)
    seen[whole_epoch(Order(seed, [("", size)], window=window), 1, size)] = True
    assert seen.all()


@settings(max_examples=10)
@given(st.integers(10**6, 10**12), st.lists(st.integers(0, 10**12 - 1), min_size=2, max_size=40, unique=True))
def test_the_largest_are_the_plain_network_number_by_number(size, positions):
    positions = sorted({position % size for position in positions})
    found = Permutation(b"1,2", size)(np.array(positions))
    assert found.tolist() == [plain(b"1,2", position, size) for position in positions]
    assert len({*found.tolist()}) == len(positions) and (found >= 0).all() and (found < size).all()


@given(st.integers(0, 4), st.integers(1, 500), st.integers(0, 5000))
def test_one_source_without_a_name_is_read_as_ever(seed, size, index):
    """Checkpoints of older versions count on it."""
    epoch, position = divmod(index, size)
    drawn = Order(seed, [("", size)]).at(np.array([index]))
    assert drawn.sample[0] == plain(b"%d,%d" % (seed, epoch), position, size) and drawn.epoch[0] == epoch


def test_the_order_never_changes():
    assert Order(7, [("", 1000)]).at(np.arange(6)).sample.tolist() == [261, 245, 21, 8, 260, 132]
    assert random_seed(0, 1, 2) != random_seed(0, 2, 1)


@pytest.mark.parametrize("window", [0, 128])
def test_epochs_seeds_and_names_have_orders_of_their_own(window):
    orders = set()
    for seed in range(3):
        for name in ("", "a", "a,1", "1", "b"):
            order = Order(seed, [(name, 1000)], window=window)
            orders |= {tuple(whole_epoch(order, epoch, 1000)) for epoch in range(3)}
    assert len(orders) == 3 * 5 * 3


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_reads_of_a_window_lie_in_few_blocks(size, window):
    found = shuffled(b"k", size, window, np.arange(size))
    if window < size and size // max(1, window // BLOCKS) >= 2 * BLOCKS:
        block = max(1, window // BLOCKS)
        for first in range(0, size - 2 * block * BLOCKS, block * BLOCKS):
            assert len(np.unique(found[first : first + block * BLOCKS] // block)) <= BLOCKS


shares = st.lists(st.one_of(st.integers(0, 5), st.integers(1, 400)), min_size=1, max_size=12).filter(any)


@settings(max_examples=200)
@given(shares)
def test_at_every_prefix_each_source_is_within_one_sample_of_its_share(shares):
    mixture, period = Mixture(tuple(shares)), sum(shares)
    source, before = mixture.at(np.arange(2 * period))
    given_ = np.cumsum(source[:, None] == np.arange(len(shares)), axis=0)
    wanted = np.arange(1, 2 * period + 1)[:, None] * np.array(shares)
    assert (np.abs(given_ * period - wanted) < period).all()
    assert (given_[-1] == 2 * np.array(shares)).all()
    for number in range(len(shares)):
        assert before[source == number].tolist() == list(range(2 * shares[number]))


@pytest.mark.parametrize("shares", [(1, 99_998, 1), (99_999, 1), (5_000,) * 20, (1,) * 300, (0, 7, 0)])
def test_extreme_shares_too(shares):
    mixture, period = Mixture(shares), sum(shares)
    for number, share in enumerate(shares):
        given_ = np.cumsum(mixture.source == number)
        assert (np.abs(given_ * period - np.arange(1, period + 1) * share) < period).all()


@given(shares, shares, st.integers(1, 3000), st.integers(0, 2**40))
def test_other_weights_from_an_index_on_move_nothing_before_it(first, second, border, far):
    num_sources = max(len(first), len(second))
    first, second = (tuple(one) + (0,) * (num_sources - len(one)) for one in (first, second))
    sources = [(f"s{number}", 50 + 7 * number) for number in range(num_sources)]
    one, two = Order(1, sources, [(0, first)]), Order(1, sources, [(0, first), (border, second)])
    before, after = np.arange(border), np.arange(border, border + sum(second))
    a, b = one.at(before), two.at(before)
    assert (a.source == b.source).all() and (a.sample == b.sample).all() and (a.epoch == b.epoch).all()
    counts = np.bincount(b.source, minlength=num_sources)
    assert (two.drawn(border) == counts).all()
    later = two.at(after)
    assert (np.bincount(later.source, minlength=num_sources) == second).all()
    for number in range(num_sources):  # Each source goes on where it was.
        sizes, places = sources[number][1], later.epoch[later.source == number]
        assert (places == (counts[number] + np.arange(len(places))) // sizes).all()
    assert two.drawn(border + far).sum() == border + far


def test_stages_that_lie_far_out_cost_nothing():
    order = Order(5, [("a", 10**6), ("b", 777)], [(0, (7, 2)), (10**12, (1, 1))])
    at = np.array([0, 10**12 - 1, 10**12, 10**12 + 1])
    assert {*order.at(at).source[2:].tolist()} == {0, 1}
    assert order.drawn(10**12).tolist() == pytest.approx([10**12 * 7 / 9, 10**12 * 2 / 9], abs=1)


@given(st.integers(1, 40), st.integers(1, 12))
def test_slots_are_shared_out_whole_and_evenly(slots, world_size):
    shares = [slots_of_rank(slots, world_size, rank) for rank in range(world_size)]
    assert [slot for share in shares for slot in share] == list(range(slots))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_slots_of_a_step_are_the_global_batch_whatever_the_micro_batch():
    batches = []
    for micro in (2, 8, 24):
        recipe = Recipe(TrainConfig(global_batch=24, micro_batch=micro), OptimConfig())
        slots = [indices_of_slot(recipe, 5, micro, slot) for slot in range(24 // micro)]
        batches.append(np.concatenate(slots).tolist())
    assert batches[0] == batches[1] == batches[2] == list(range(96, 120))
