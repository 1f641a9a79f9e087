"""Which layers take part: patience, coming back, and whose entries count for the budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.core.balancing.attendance import PATIENCE, Attendance


def observe(attendance, *present, steps=1):
    """So many steps with these layers; whether the last one has changed who is live."""
    there = np.zeros(len(attendance.away), bool)
    there[list(present)] = True
    for _ in range(steps):
        changed = attendance.observe(there)
    return changed


def test_all_are_live_and_count_at_first():
    attendance = Attendance(3)
    assert attendance.live.tolist() == attendance.counted.tolist() == [True] * 3
    assert not attendance.seen.any()


def test_a_layer_loses_its_share_when_patience_is_over_and_no_step_earlier():
    attendance = Attendance(2)
    assert not observe(attendance, 0, steps=PATIENCE - 1)
    assert attendance.live.all()
    assert observe(attendance, 0)
    assert attendance.live.tolist() == [True, False]
    assert not observe(attendance, 0, steps=100)


def test_a_single_step_is_enough_to_come_back():
    attendance = Attendance(2)
    observe(attendance, 0, steps=PATIENCE)
    assert observe(attendance, 0, 1)
    assert attendance.live.all()
    assert attendance.away.tolist() == [0, 0]


def test_patience_is_counted_in_steps_in_a_row():
    attendance = Attendance(2)
    for _ in range(5):
        assert not observe(attendance, 0, steps=PATIENCE - 1)
        assert not observe(attendance, 0, 1)
    assert attendance.patience.tolist() == [PATIENCE] * 2


def test_patience_doubles_whenever_a_layer_comes_back_that_had_lost_its_share():
    attendance, patience = Attendance(2), PATIENCE
    for _ in range(5):
        assert attendance.patience.tolist() == [PATIENCE, patience]
        assert not observe(attendance, 0, steps=patience - 1)
        assert observe(attendance, 0)
        assert observe(attendance, 0, 1)
        patience *= 2


def test_a_layer_of_every_n_th_step_keeps_its_share_in_the_end():
    attendance, lost = Attendance(2), 0
    for number in range(2000):
        lost += observe(attendance, *([0, 1] if number % 50 == 0 else [0]))
    assert lost == 6  # it left and came back with a patience of 10, 20 and 40 steps
    assert attendance.patience[1] == 80


def test_a_layer_that_never_came_counts_no_longer_when_patience_is_over():
    attendance = Attendance(3)
    observe(attendance, 0, 1)
    observe(attendance, 0, steps=PATIENCE)
    assert attendance.live.tolist() == [True, False, False]
    assert attendance.counted.tolist() == [True, True, False]
    observe(attendance, 2)
    assert attendance.counted.tolist() == [True, True, True]


@pytest.mark.parametrize("steps", [0, 3, 300])
def test_no_layers_are_no_trouble(steps):
    attendance = Attendance(0)
    assert not any(attendance.observe(np.zeros(0, bool)) for _ in range(steps))
    again = Attendance(0)
    again.restore(attendance.state())
    assert again.live.shape == again.counted.shape == (0,)


histories = st.lists(st.tuples(st.sets(st.integers(0, 3)), st.integers(1, 45)), max_size=8)


@given(histories, histories)
def test_a_saved_state_goes_on_alike(before, after):
    attendance, again = Attendance(4), Attendance(4)
    for present, steps in before:
        observe(attendance, *present, steps=steps)
    state = attendance.state()
    assert state.dtype == np.int64
    assert state.shape == (3, 4)
    kept = state.copy()
    again.restore(state)
    for present, steps in after:
        assert observe(attendance, *present, steps=steps) == observe(again, *present, steps=steps)
        assert np.array_equal(attendance.live, again.live)
        assert np.array_equal(attendance.counted, again.counted)
    assert np.array_equal(attendance.state(), again.state())
    assert np.array_equal(state, kept)  # it was copied


@given(histories)
def test_whoever_was_there_in_the_last_step_is_live(history):
    attendance = Attendance(4)
    for present, steps in history:
        before = attendance.live
        changed = observe(attendance, *present, steps=steps)
        assert attendance.live[list(present)].all()
        assert attendance.counted[attendance.live].all()
        if steps == 1:
            assert changed == (attendance.live != before).any()
