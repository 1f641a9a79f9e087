"""A step can be given up at any point, by all ranks, and then comes the next one."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.errors import DLSError, NonFiniteGradientError
from tests.core.network import connect, outputs
from tests.core.options import OPTIONS, each_option
from tests.core.ranks import draw_gradients, frozen, same
from tests.core.session.small_steps import (
    NAMES,
    check_alike,
    hear,
    sessions_of,
    trained,
)
from tests.core.strategies import seeds

# By all ranks, in the middle of gathering -------------------------------------------------------


@settings(max_examples=20)
@given(
    options=st.sampled_from(OPTIONS),
    points=st.tuples(*[st.integers(0, len(NAMES))] * 3),
    receive=st.sets(st.integers(0, 2)),
    times=st.integers(1, 3),
    seed=seeds,
)
def test_before_sums_are_written_nothing_has_changed(options, points, receive, times, seed):
    rng = np.random.default_rng(seed)
    ranks = connect(trained(rng, int(rng.integers(4)), 3, **options))
    others = copy.deepcopy(ranks)
    before = [frozen(rank.session) for rank in ranks]
    records = [rank.session.last_step for rank in ranks]
    for _ in range(times):
        for rank, point in zip(ranks, points, strict=True):
            gradients = draw_gradients(rng, rank.session)
            for name in rng.permutation(NAMES).tolist()[:point]:
                rank.compress(name, gradients[name])
            assert rank.session.in_step == (point > 0)
        if points == (6, 6, 6):  # so that all has been sent
            for number in receive:
                ranks[number].receive()
        for rank, state, record in zip(ranks, before, records, strict=True):
            assert frozen(rank.session) == state  # it can be saved
            rank.abandon()
            assert not rank.session.in_step
            assert frozen(rank.session) == state
            assert rank.session.last_step is record
            assert rank.session.unfinished() == rank.session.ready() == []
    late = [rank for rank, point in zip(ranks, points, strict=True) if not point]
    if late and not ranks[0].session.dense_step:
        if all(point in (0, len(NAMES)) for point in points):
            return  # all was sent: who is late would make the step
        for _ in range(times):
            for rank in late:
                gradients = draw_gradients(rng, rank.session)
                for name in NAMES:
                    rank.compress(name, gradients[name])
            hear(late)
    check_alike(ranks, others)


def test_there_is_nothing_to_give_up_between_steps():
    rng = np.random.default_rng(0)
    sessions = trained(rng)
    before = [frozen(session) for session in sessions]
    assert [session.abandon() for session in sessions] == [{}, {}]
    assert [frozen(session) for session in sessions] == before
    assert sessions[0].last_step.step == 3
    check_alike(connect(sessions), connect(copy.deepcopy(sessions)))


def test_a_layer_that_comes_twice_is_refused_until_the_step_is_given_up():
    session, _ = sessions_of()
    gradient = np.ones(600, np.float32)
    session.compress("conv2.weight", gradient)
    with pytest.raises(DLSError, match=r"'conv2.weight': compressed twice"):
        session.compress("conv2.weight", gradient)
    assert session.has("conv2.weight")
    session.abandon()
    assert not session.has("conv2.weight")
    session.compress("conv2.weight", gradient)
    with pytest.raises(DLSError, match="a step is in progress: end it or abandon it before"):
        session.begin()


def test_the_loss_scale_may_change_once_a_step_is_given_up():
    session, _ = sessions_of()
    session.compress("conv2.weight", np.ones(600, np.float32))
    with pytest.raises(DLSError, match="within a step"):
        session.scale_to(2.0)
    session.abandon()
    session.scale_to(2.0)
    assert session.loss_scale == 2.0


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("dense_steps", [0, 9])
def test_a_step_with_nan_that_is_given_up_is_neither_refused_nor_skipped(nonfinite, dense_steps):
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 2, nonfinite=nonfinite, dense_steps=dense_steps, momentum=0.5))
    others = copy.deepcopy(ranks)
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        gradients["fc.weight"][3] = np.nan
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank in ranks:
        rank.abandon()
        assert not rank.session.refused
        assert rank.session.skipped == 0
    check_alike(ranks, others)


# Once the first sum is written ------------------------------------------------------------------


@each_option
@pytest.mark.parametrize("written", [1, 3, 5])
def test_once_a_sum_is_written_the_step_is_brought_to_its_end(options, written):
    rng = np.random.default_rng(written)
    ranks = connect(trained(rng, 3, **options))
    others = copy.deepcopy(ranks)
    for rank, other in zip(ranks, others, strict=True):
        gradients = draw_gradients(rng, rank.session)
        for name in NAMES:
            rank.compress(name, gradients[name].copy())
            other.compress(name, gradients[name].copy())
    for rank, other in zip(ranks, others, strict=True):
        rank.receive()
        other.receive()
    expected = []
    for other in others:
        out = outputs(other.session, NAMES)
        expected.append(out)
        for name in NAMES:
            other.finish(name, out[name], others)
    # Rank 0 gives it up behind some layers; rank 1 does not.
    order, out = rng.permutation(NAMES).tolist(), outputs(ranks[0].session, NAMES)
    for name in order[:written]:
        ranks[0].finish(name, out[name], ranks)
    with pytest.raises(DLSError, match="while gradients are being written"):
        ranks[0].session.state_dict()
    assert ranks[0].session.abandon() == {}
    assert not ranks[0].session.in_step
    last = outputs(ranks[1].session, NAMES)
    for name in NAMES:
        ranks[1].finish(name, last[name], ranks)
    assert same(last, expected[1])
    assert same({n: out[n] for n in order[:written]}, {n: last[n] for n in order[:written]})
    for rank, other in zip(ranks, others, strict=True):
        assert frozen(rank.session) == frozen(other.session)
        assert rank.session.last_step.step == other.session.last_step.step == 4
        assert np.array_equal(rank.session.last_step.k, other.session.last_step.k)
    check_alike(ranks, others)


@pytest.mark.parametrize("accepted", [1, 3, 5])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("bad", [None, *NAMES])
def test_a_dense_step_writes_nothing_before_its_end(accepted, nonfinite, bad):
    """So velocities do not take in what may turn out to hold NaN."""
    options = {"momentum": 0.5, "dense_steps": 9, "nonfinite": nonfinite, "prior": "measured"}
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 2, **options))
    others, before = copy.deepcopy(ranks), [frozen(rank.session) for rank in ranks]
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        if bad:
            gradients[bad][0] = np.inf
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank, state in zip(ranks, before, strict=True):
        out = outputs(rank.session, NAMES)
        for name in NAMES[:accepted]:
            rank.finish(name, out[name], ranks)
        rank.abandon()
        assert not rank.session.in_step
        assert frozen(rank.session) == state
        assert rank.session.skipped == 0
    check_alike(ranks, others)


@pytest.mark.parametrize("written", [1, 3, 5])
def test_a_skipped_step_is_skipped_also_where_it_is_given_up(written):
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 2, nonfinite="skip", momentum=0.5))
    others, before = copy.deepcopy(ranks), [frozen(rank.session) for rank in ranks]
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        gradients["conv1.weight"][0] = np.nan
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank in ranks:
        rank.receive()
    for rank, state in zip(ranks, before, strict=True):
        out = outputs(rank.session, NAMES)
        for name in NAMES[:written]:
            rank.finish(name, out[name], ranks)
            assert not out[name].any()
        assert frozen(rank.session) == state  # nothing is being written: it can be saved
        rank.abandon()
        assert (rank.session.refused, rank.session.skipped) == (True, 1)
        assert frozen(rank.session) == state
    check_alike(ranks, others)


def test_behind_an_error_about_nan_there_is_nothing_left_to_give_up():
    rng = np.random.default_rng(0)
    ranks = connect(trained(rng, 2))
    others = copy.deepcopy(ranks)
    for rank in ranks:
        gradients = draw_gradients(rng, rank.session)
        gradients["conv1.bias"][0] = np.nan
        for name in NAMES:
            rank.compress(name, gradients[name])
    for rank in ranks:
        rank.receive()
        with pytest.raises(NonFiniteGradientError):
            rank.finish("fc.weight", np.empty(1200, np.float32), ranks)
        assert not rank.session.in_step
        assert rank.session.abandon() == {}
    check_alike(ranks, others)
