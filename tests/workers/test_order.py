from hashlib import blake2b
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workers.common.errors import ConfigError
from workers.data import order as order_module
from workers.data.config import shares_of
from workers.data.order import (
    ARRAY,
    WINDOW_BLOCKS,
    Order,
    indices_of_slot,
    permuted,
    random_seed,
    sample_at,
    samples_of_slot,
    slots_of_rank,
)


def first_order(seed: int, index: int, num_samples: int) -> int:
    """The function as it was when there was one source without a name."""
    epoch, position = divmod(index, num_samples)
    half_bits = max(1, (num_samples - 1).bit_length() + 1 >> 1)
    mask = (1 << half_bits) - 1
    while True:
        left, right = position >> half_bits, position & mask
        for round_ in range(4):
            key = b"%d,%d,%d,%d" % (seed, epoch, round_, right)
            left, right = right, left ^ (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") & mask)
        position = left << half_bits | right
        if position < num_samples:
            return position


def inverse(seed: int, epoch: int, sample: int, num_samples: int) -> int:
    """Return the place of an epoch at which a sample comes."""
    half_bits = max(1, (num_samples - 1).bit_length() + 1 >> 1)
    mask = (1 << half_bits) - 1
    while True:
        left, right = sample >> half_bits, sample & mask
        for round_ in reversed(range(4)):
            key = b"%d,%d,%d,%d" % (seed, epoch, round_, left)
            left, right = right ^ (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") & mask), left
        sample = left << half_bits | right
        if sample < num_samples:
            return sample


SHARES = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)


def alone(seed: int, num_samples: int, name: str = "", window: int = 0) -> Order:
    return Order(seed, [(name, num_samples)], [(0, (1,))], window)


def epoch_of(order: Order, epoch: int, size: int) -> list[int]:
    drawn = order.at(np.arange(epoch * size, (epoch + 1) * size))
    assert (drawn.epoch == epoch).all() and (drawn.source == 0).all()
    return drawn.sample.tolist()


@pytest.mark.parametrize("size", range(1, 130))
def test_every_epoch_of_every_small_size_reads_every_sample_once(size):
    for window in (0, 1, 70, 128, 300):
        for epoch in (0, 1, 10**9):
            assert sorted(epoch_of(alone(size, size, "a", window), epoch, size)) == list(range(size))


@settings(max_examples=12, deadline=None)
@given(st.integers(-3, 2**63), st.integers(1, 10**6), st.sampled_from([0, 1, 10**6]), st.integers(0, 10**6))
@example(0, 2**16 + 1, 0, 0)
@example(1, 10**6, 1, 640)
@example(1, 10**6, 1, 999_999)
def test_every_epoch_reads_every_sample_once(seed, size, epoch, window):
    drawn = alone(seed, size, "a", window).at(np.arange(epoch * size, (epoch + 1) * size))
    assert (np.bincount(drawn.sample, minlength=size) == 1).all() and (drawn.epoch == epoch).all()


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 10**12), st.integers(0, 10**6), st.integers(0, 10**12), st.integers(1, 40))
@example(0, 2**32, 0, 2**32 - 1, 1)
@example(0, 2**32 + 1, 3, 2**32, 20)
@example(0, 2**40, 3, 2**40 - 20, 20)
def test_sizes_of_all_orders_go_to_and_fro_as_ever(seed, size, epoch, position, count):
    """From one to 10^12 samples, one by one and as arrays, the order is the first one and can be undone."""
    places = np.arange(min(position, size - 1), min(position + count, size), dtype=np.int64)
    found = alone(seed, size).at(epoch * size + places)
    for place, sample in zip(places.tolist(), found.sample.tolist(), strict=True):
        assert 0 <= sample < size and inverse(seed, epoch, sample, size) == place
        assert first_order(seed, epoch * size + place, size) == sample == sample_at(seed, epoch * size + place, size)


@pytest.mark.parametrize("size", [1, 2, 5, 100, 70_000])
def test_one_by_one_and_as_an_array_are_one_order(size):
    indices = np.random.default_rng(0).integers(0, 3 * size, 500)
    whole = alone(4, size).at(indices)
    for number in (0, 1, 77, 499):
        one = alone(4, size).at(indices[number : number + 1])
        assert (one.sample[0], one.epoch[0]) == (whole.sample[number], whole.epoch[number])
    assert whole.sample.tolist() == [first_order(4, index, size) for index in indices.tolist()]
    assert alone(4, size).at(indices[:0]).sample.shape == (0,)


def test_epochs_seeds_names_and_windows_have_orders_of_their_own():
    size = 1000
    cases = [
        (s, name, w)
        for s in range(3)
        for name in ("", "a", "b", "a,1", "1", "1:a,", "window 0,", "blocks,")
        for w in (0, 64, 200)
    ]
    orders = {tuple(epoch_of(alone(s, size, name, w), e, size)) for s, name, w in cases for e in range(3)}
    assert len(orders) == len(cases) * 3


def test_a_window_is_read_from_few_places_and_in_no_order():
    size, window = 100_000, 6400
    block = window // WINDOW_BLOCKS
    samples = np.array(epoch_of(alone(1, size, "a", window), 0, size))
    for start in range(0, size, window):
        blocks = np.unique(samples[start : start + window] // block)
        assert len(blocks) <= WINDOW_BLOCKS
    assert len(np.unique(samples[:window] // block)) == WINDOW_BLOCKS
    assert np.abs(np.diff(samples[:window]) == 1).mean() < 0.02, "neighbours are not read one after the other"
    assert np.ptp(samples[:window]) > size / 2, "the blocks come from all over the source"
    short = np.array(epoch_of(alone(1, 655, "a", 640), 0, 655))
    assert len(np.unique(short[:640] // 10)) == WINDOW_BLOCKS and {650, 651, 652, 653, 654} <= set(short[640:])


def test_a_window_that_holds_the_whole_source_is_none():
    for size in (1, 63, 64, 500):
        assert epoch_of(alone(1, size, "a", 500), 0, size) == epoch_of(alone(1, size, "a"), 0, size)


def prefixes_within_one(order: Order, first: int, shares: tuple[int, ...], length: int) -> None:
    """Within one sample of its share at every prefix of `length` samples from `first` on, in integers."""
    source = order.at(np.arange(first, first + length)).source
    total, places = sum(shares), np.arange(1, length + 1)
    for number, share in enumerate(shares):
        count = np.cumsum(source == number)
        assert (np.abs(count * total - places * share) < total).all(), (shares, number)
        assert share or not count[-1]


def mixed(shares, size: int = 1000, seed: int = 0) -> Order:
    return Order(seed, [(f"s{i}", size) for i in range(len(shares))], [(0, tuple(shares))])


def test_all_mixtures_of_few_samples_are_within_one_at_every_prefix():
    vectors = [(a, b, c) for a in range(8) for b in range(8) for c in range(8) if a + b + c]
    for shares in vectors:
        prefixes_within_one(mixed(shares), 0, shares, 2 * sum(shares) + 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=20).filter(any), st.integers(0, 10**12))
@example([1, 999_999], 0)
@example([999_999, 1], 5)
@example([50_000] * 19 + [49_999], 0)
@example([1] * 19 + [999_981], 0)
@example([333_333, 333_334, 333_333], 10**12)
def test_shares_are_within_one_sample_at_every_prefix(shares, periods):
    total = sum(shares)
    prefixes_within_one(mixed(shares), periods * total, tuple(shares), total + 7)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)), max_size=4
    ),
    st.lists(st.integers(1, 30), min_size=3, max_size=3),
    st.integers(0, 100),
)
def test_stages_move_nothing_before_them_and_go_on_from_there(stages, sizes, window):
    """Each source's samples come one after the other in its own order, through all stages, none left out."""
    sources = [(name, size) for name, size in zip("abc", sizes, strict=True)]
    firsts = np.cumsum([0, *(length for length, _ in stages)])
    wanted = [(int(first), tuple(shares)) for first, (_, shares) in zip(firsts, [*stages, (0, [1, 2, 3])], strict=True)]
    end = int(firsts[-1]) + 300
    drawn = Order(5, sources, wanted, window).at(np.arange(end))
    for number, (name, size) in enumerate(sources):
        own = drawn.source == number
        expected = alone(5, size, name, window).at(np.arange(own.sum()))
        assert drawn.sample[own].tolist() == expected.sample.tolist()
        assert drawn.epoch[own].tolist() == expected.epoch.tolist()
    for i, (first, shares) in enumerate(wanted):
        length = (wanted[i + 1][0] if i + 1 < len(wanted) else end) - first
        prefixes_within_one(Order(5, sources, wanted, window), first, shares, length)
        before = Order(5, sources, wanted[: i + 1], window).at(np.arange(first + length))
        assert (before.source == drawn.source[: first + length]).all()
        assert (before.sample == drawn.sample[: first + length]).all()


def test_a_stage_far_out_goes_on_from_the_right_sample():
    border = 10**12 + 1
    order = Order(0, [("a", 10**6), ("b", 7)], [(0, (2, 3)), (border, (1, 0)), (border + 10, (3, 2))])
    drawn = order.at(np.arange(border, border + 30))
    assert (drawn.source[:10] == 0).all()
    places = np.flatnonzero(drawn.source == 0)
    before = int(np.count_nonzero(order.at(np.arange(border - 1, border)).source == 0)) + 2 * (border - 1) // 5
    expected = alone(0, 10**6, "a").at(before + np.arange(len(places)))
    assert drawn.sample[places].tolist() == expected.sample.tolist()
    assert drawn.epoch[places].tolist() == expected.epoch.tolist()


def test_the_order_is_the_same_in_any_pieces_and_any_sequence():
    order = Order(3, [("a", 50), ("b", 3000), ("c", 1)], [(0, (5, 4, 1)), (777, (1, 1, 8))], 128)
    whole = order.at(np.arange(2000))
    shuffled = np.random.default_rng(1).permutation(2000)
    parts = [order.at(part) for part in np.array_split(shuffled, [1, 2, 10, 30, 31, 500])]
    for field in ("source", "sample", "epoch"):
        assert (np.concatenate([getattr(part, field) for part in parts]) == getattr(whole, field)[shuffled]).all()


def test_weights_as_people_write_them():
    prefixes_within_one(mixed(shares_of([0.7, 0.2, 0.1])), 0, (7, 2, 1), 1000)
    prefixes_within_one(mixed(shares_of([0.123456, 0.876544])), 0, shares_of([0.123456, 0.876544]), 20_000)


def test_what_is_no_order_is_refused():
    with pytest.raises(ConfigError, match="data.sources: b has no training sample"):
        Order(0, [("a", 5), ("b", 0)], [(0, (1, 0)), (9, (1, 1))])
    assert Order(0, [("a", 5), ("b", 0)], [(0, (1, 0))]).at(np.arange(9)).source.tolist() == [0] * 9
    for stages in ([], [(1, (1, 1))], [(0, (1, 1)), (0, (1, 1))], [(0, (1,))], [(0, (0, 0))], [(0, (2, -1))]):
        with pytest.raises(ValueError):
            Order(0, [("a", 5), ("b", 5)], stages)
    with pytest.raises(ValueError, match="one name"):
        Order(0, [("a", 5), ("a", 5)], [(0, (1, 1))])


def test_memory_does_not_grow_with_what_is_read():
    order_module._permutation.cache_clear()
    order = Order(0, [("a", 3000), ("b", 10**12)], [(0, (1, 1))], 6400)
    for start in range(0, 400_000, 1000):
        order.at(np.arange(start, start + ARRAY * 40))
    assert order_module._permutation.cache_info().currsize <= order_module.PERMUTATIONS


def test_the_order_never_changes():
    """Checkpoints of older versions count on it: whoever changes this breaks every resumed run."""
    assert [sample_at(7, i, 1000) for i in range(6)] == GOLDEN
    assert alone(7, 1000).at(np.arange(6)).sample.tolist() == GOLDEN
    assert random_seed(0, 1, 2) != random_seed(0, 2, 1)
    order = Order(7, [("web", 1000), ("code", 70_000)], [(0, (3, 2)), (6, (1, 3))], 320)
    drawn = order.at(np.arange(12))
    assert list(zip(drawn.source.tolist(), drawn.sample.tolist(), strict=True)) == GOLDEN_MIXTURE
    assert permuted(b"", 7, 0, 1000, np.arange(6)).tolist() == GOLDEN


@given(st.integers(1, 40), st.integers(1, 12))
def test_slots_are_shared_out_whole_and_evenly(slots, world_size):
    shares = [slots_of_rank(slots, world_size, rank) for rank in range(world_size)]
    assert [slot for share in shares for slot in share] == list(range(slots))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_slots_of_a_step_are_the_global_batch_whatever_the_micro_batch():
    batches = [
        [s for slot in range(24 // micro) for s in samples_of_slot(3, 5, slot, 24, micro, 1000)] for micro in (2, 8, 24)
    ]
    assert batches[0] == batches[1] == batches[2] and len(set(batches[0])) == 24
    indices = np.concatenate([indices_of_slot(5, slot, 24, 8) for slot in range(3)])
    assert alone(3, 1000).at(indices).sample.tolist() == batches[0]


def test_the_table_is_the_earliest_deadline_of_those_whose_turn_has_come():
    """Place by place, in plain Python: released at floor(k D / s), due at ceil((k + 1) D / s)."""
    for shares in ((3, 2), (1, 5), (2, 2, 3), (7, 1, 1, 4)):
        total, taken, expected = sum(shares), [0] * len(shares), []
        for place in range(total):
            open_ = [
                (ceil((taken[i] + 1) * total / s), i)
                for i, s in enumerate(shares)
                if taken[i] < s and floor(taken[i] * total / s) <= place
            ]
            expected.append(min(open_)[1])
            taken[expected[-1]] += 1
        assert mixed(shares).at(np.arange(total)).source.tolist() == expected


GOLDEN = [261, 245, 21, 8, 260, 132]
GOLDEN_MIXTURE = [
    *((0, 477), (1, 25156), (0, 480), (0, 881), (1, 34105), (0, 582)),
    *((1, 69892), (1, 54729), (0, 336), (1, 26926), (1, 46103), (1, 27244)),
]
