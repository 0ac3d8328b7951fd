import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinysft_jax.data import packing
from tinysft_jax.data.packing import plan_epoch
from tinysft_jax.errors import UserError


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120), st.booleans(), st.integers(2, 60))
def test_every_conversation_is_in_exactly_one_row_and_every_row_fits(lengths, seq_len, shuffle, window):
    lengths = np.array(lengths, np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        plan = plan_epoch(lengths, seq_len, shuffle=shuffle)
    assert sorted(plan.order) == list(range(len(lengths)))
    assert plan.row_starts[0] == 0 and plan.row_starts[-1] == len(lengths)
    for row in range(len(plan)):
        assert len(plan.row(row)) >= 1
        assert lengths[plan.row(row)].sum() <= seq_len


def naive_best_fit(lengths, seq_len):
    """The number of rows, by looking at every row for every conversation."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        row = min(fitting, key=lambda row: rooms[row], default=None)
        if row is None:
            rooms.append(seq_len - length)
        else:
            rooms[row] -= length
    return len(rooms)


@example([38, 32, 26, 19, 13])  # two rows; three if 26 went to the emptier one
@given(st.lists(st.integers(1, 64), max_size=80))
def test_each_conversation_goes_to_the_fullest_row_with_room(lengths):
    plan = plan_epoch(np.array(lengths, np.int32), 64)
    assert len(plan) == naive_best_fit(lengths, 64)


def test_rows_of_story_lengths_are_nearly_full():
    lengths = np.clip(np.random.default_rng(0).normal(230, 80, 20_000), 40, 512).astype(np.int32)
    plan = plan_epoch(lengths, 1024)
    assert lengths.sum() / (len(plan) * 1024) > 0.99


def test_an_epoch_is_a_function_of_seed_and_number():
    lengths = np.random.default_rng(0).integers(1, 50, 500).astype(np.int32)
    one, same = plan_epoch(lengths, 64, seed=3, epoch=1), plan_epoch(lengths, 64, seed=3, epoch=1)
    np.testing.assert_array_equal(one.order, same.order)
    np.testing.assert_array_equal(one.row_starts, same.row_starts)
    for other in (plan_epoch(lengths, 64, seed=3, epoch=2), plan_epoch(lengths, 64, seed=4, epoch=1)):
        assert not np.array_equal(one.order, other.order)


def test_a_part_of_the_conversations_can_be_packed():
    lengths = np.array([5, 60, 7, 9], np.int32)
    assert sorted(plan_epoch(lengths, 20, among=np.array([0, 2, 3])).order) == [0, 2, 3]


def test_a_conversation_longer_than_a_row_is_an_error():
    with pytest.raises(UserError, match=r"seq_len is 50.*has 60 tokens.*--max_tokens"):
        plan_epoch(np.array([5, 60], np.int32), 50)
