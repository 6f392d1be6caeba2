from hypothesis import given
from hypothesis import strategies as st

from workers.data.order import random_seed, sample_at, samples_of_slot, slots_of_rank


@given(st.integers(0, 5), st.integers(1, 300), st.integers(0, 3))
def test_every_epoch_reads_every_sample_once(seed, num_samples, epoch):
    read = [sample_at(seed, epoch * num_samples + i, num_samples) for i in range(num_samples)]
    assert sorted(read) == list(range(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(sample_at(s, e * 50 + i, 50) for i in range(50)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_the_order_never_changes():
    """Checkpoints of older versions count on it: whoever changes this breaks every resumed run."""
    assert [sample_at(7, i, 1000) for i in range(6)] == GOLDEN
    assert random_seed(0, 1, 2) != random_seed(0, 2, 1)


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


GOLDEN = [261, 245, 21, 8, 260, 132]
