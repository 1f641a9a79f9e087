"""Gradients with NaN or Inf, on any rank and in any layer."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.errors import NonFiniteGradientError
from tests.core.options import OPTIONS
from tests.core.ranks import (
    DENSE,
    LAYERS,
    SPARSE,
    copies,
    draw_gradients,
    frozen,
    make_sessions,
    run,
    same,
    step,
    velocities_of,
)
from tests.core.strategies import seeds

BAD = [np.nan, np.inf, -np.inf]


def spoil(gradients, where, bad=np.nan):
    for name, rank in where:
        gradients[rank][name][7] = bad
    return gradients


# Raise or skip ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    options=st.sampled_from(OPTIONS),
    nonfinite=st.sampled_from(["raise", "skip"]),
    steps_before=st.integers(0, 4),
    where=st.lists(
        st.tuples(st.sampled_from(SPARSE + DENSE), st.integers(0, 2)), min_size=1, max_size=4
    ),
    bad=st.sampled_from(BAD),
    marks=st.booleans(),
    seed=seeds,
)
def test_a_step_that_is_refused_might_as_well_not_have_been(
    options, nonfinite, steps_before, where, bad, marks, seed
):
    rng = np.random.default_rng(seed)
    sessions = make_sessions(3, nonfinite=nonfinite, **options)
    for session in sessions:
        session.marks_skipped = marks
    run(sessions, rng, steps_before)
    others, before = copy.deepcopy(sessions), [frozen(session) for session in sessions]
    dense, records = sessions[0].dense_step, [session.last_step for session in sessions]
    gradients = spoil([draw_gradients(rng, session) for session in sessions], where, bad)
    sums, errors = step(sessions, gradients, rng)
    for session, state, record in zip(sessions, before, records, strict=True):
        assert frozen(session) == state
        assert session.last_step is record
        assert session.unfinished() == []
    if nonfinite == "raise":
        seen = sorted({(name, None if dense else rank) for name, rank in where})
        assert [error.where for error in errors] == [seen] * 3
        assert len({str(error) for error in errors}) == 1
    else:
        assert not errors
        assert all(session.refused for session in sessions)
        assert [session.skipped for session in sessions] == [1] * 3
        filled = np.inf if marks else 0
        for out in sums:
            for name, values in out.items():
                # Of a dense step's layers, those that came before it was known are as they were.
                if not dense or name in dict(where):
                    assert (values == filled).all()
    for _ in range(3):
        gradients = [draw_gradients(rng, session) for session in sessions]
        again, expected = (step(each, gradients)[0] for each in (sessions, others))
        assert all(same(*pair) for pair in zip(again, expected, strict=True))
    for session, other in zip(sessions, others, strict=True):
        assert frozen(session) == frozen(other)
        assert not session.refused
        assert session.skipped == (nonfinite == "skip")


def test_every_rank_names_the_layer_and_the_rank():
    error = NonFiniteGradientError([("b", 1), ("a", 3), ("b", 1)])
    assert "layer 'a' on rank 3, layer 'b' on rank 1;" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.where) == (str(error), error.where)
    assert isinstance(error, ArithmeticError)


def test_of_a_sum_the_rank_is_not_known():
    error = NonFiniteGradientError([("b", None), ("a", 3)])
    assert "layer 'a' on rank 3, layer 'b' of some rank;" in str(error)
    assert pickle.loads(pickle.dumps(error)).where == error.where


def test_the_error_names_hosts_where_a_rank_sends_for_its_host():
    error = NonFiniteGradientError([("b", None), ("a", 3)], of_hosts=True)
    assert "layer 'a' on the host of rank 3, layer 'b' of some rank;" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("bucket_bytes", [1, 90_000, 1 << 25])
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_layers_that_go_dense_are_watched(bucket_bytes, name, rank):
    sessions, rng = make_sessions(3, bucket_bytes=bucket_bytes), np.random.default_rng(0)
    gradients = [draw_gradients(rng, session) for session in sessions]
    _, errors = step(sessions, spoil(gradients, [(name, rank)]), rng)
    assert [error.where for error in errors] == [[(name, rank)]] * 3


def test_a_step_of_dense_layers_alone_is_watched_too():
    sessions, rng = make_sessions(2, nonfinite="skip", momentum=0.5), np.random.default_rng(0)
    run(sessions, rng, 1)
    before = [frozen(session) for session in sessions]
    gradients = [draw_gradients(rng, session) for session in sessions]
    some = [{name: g[name] for name in DENSE} for g in spoil(gradients, [("fc.bias", 1)])]
    sums, errors = step(sessions, some)
    assert not errors
    assert not any(out[name].any() for out in sums for name in DENSE)
    assert [frozen(session) for session in sessions] == before


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("dense_steps", [0, 9])
def test_nothing_of_a_refused_step_comes_with_the_next_one_if_that_has_fewer_layers(
    nonfinite, dense_steps
):
    options = {"momentum": 0.5, "nonfinite": nonfinite, "dense_steps": dense_steps}
    sessions, rng = make_sessions(2, **options), np.random.default_rng(0)
    run(sessions, rng, 2)
    before = [(copies(s.residuals), velocities_of(s)) for s in sessions]
    step(sessions, spoil([draw_gradients(rng, s) for s in sessions], [("fc.weight", 1)]))
    gradients = [draw_gradients(rng, session) for session in sessions]
    step(sessions, [{"conv2.weight": gradient["conv2.weight"]} for gradient in gradients])
    for session, (residuals, velocities) in zip(sessions, before, strict=True):
        after = velocities_of(session)
        for name in {*SPARSE, *DENSE} - {"conv2.weight"}:
            assert np.array_equal(after[name], velocities[name])
            if name in SPARSE:
                assert np.array_equal(session.residuals[name], residuals[name])


# A sum that overflows ---------------------------------------------------------------------------


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("strategy", ["dls", "global", "norm", "hard"])
def test_a_residual_that_would_overflow_is_refused_and_stays_as_it_is(nonfinite, strategy):
    layers = [layer_spec("a", (2000, 1)), layer_spec("b", (2000, 1))]
    options = {"threshold": 3.1e38} if strategy == "hard" else {}
    sessions = make_sessions(2, layers, nonfinite=nonfinite, strategy=strategy, **options)
    rng = np.random.default_rng(6)
    huge = [{name: np.full(2000, 3e38, np.float32) for name in "ab"} for _ in sessions]
    tiny = [{name: rng.random(2000, np.float32) for name in "ab"} for _ in sessions]
    huge[1] = tiny[1]
    assert step(sessions, huge)[1] == []
    before = [frozen(session) for session in sessions]
    sums, errors = step(sessions, huge)
    if nonfinite == "raise":
        assert [error.where for error in errors] == [[("a", 0), ("b", 0)]] * 2
    else:
        assert not any(values.any() for out in sums for values in out.values())
    assert [frozen(session) for session in sessions] == before
    assert step(sessions, tiny)[1] == []


def test_a_velocity_that_would_overflow_is_refused_and_stays_as_it_is():
    layers = [layer_spec("a", (2000, 1)), layer_spec("b", (2000, 1))]
    sessions = make_sessions(2, layers, density=1.0, momentum=0.5, momentum_masking=False)
    huge = [{name: np.full(2000, 3e38, np.float32) for name in "ab"} for _ in sessions]
    huge[1]["b"] = huge[0]["b"] = huge[1]["a"] = np.ones(2000, np.float32)
    assert step(sessions, huge)[1] == []
    before = [frozen(session) for session in sessions]
    _, errors = step(sessions, huge)
    assert [error.where for error in errors] == [[("a", 0)]] * 2
    assert [frozen(session) for session in sessions] == before


def test_dense_steps_tell_of_all_layers_the_same_on_every_rank():
    sessions, rng = make_sessions(3, dense_steps=1), np.random.default_rng(0)
    gradients = [draw_gradients(rng, session) for session in sessions]
    where = [("fc.weight", 0), ("fc.bias", 1), ("conv2.weight", 2)]
    _, errors = step(sessions, spoil(gradients, where), rng)
    assert [error.where for error in errors] == [sorted((name, None) for name, _ in where)] * 3


def test_dense_steps_look_at_the_sum():
    sessions = make_sessions(2, dense_steps=1, nonfinite="skip", momentum=0.5)
    gradients = [draw_gradients(np.random.default_rng(0), session) for session in sessions]
    before = [frozen(session) for session in sessions]
    for gradient in gradients:
        gradient["fc.weight"][5] = 3e38  # finite on each rank
    step(sessions, gradients)
    assert all(session.refused for session in sessions)
    assert [frozen(session) for session in sessions] == before
    assert sessions[0].dense_step


# Skip -------------------------------------------------------------------------------------------


def test_refused_tells_of_the_step_in_progress_or_else_of_the_last_one():
    sessions, rng = make_sessions(2, nonfinite="skip"), np.random.default_rng(0)
    for number in range(1, 4):
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, spoil(gradients, [("fc.bias", 0)]))
        assert all(session.refused for session in sessions)
        assert sessions[0].skipped == number
    assert sessions[0].last_step is None
    sessions[0].note("fc.bias", finite=True)
    assert not sessions[0].refused


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16, np.float64])
def test_a_skipped_step_writes_zeros_or_inf_where_they_are_looked_for(dtype, marks):
    layer = layer_spec("w", (64, 64), itemsize=8 if dtype == np.float64 else 4)
    session = make_sessions(2, [layer], nonfinite="skip")[0]
    session.marks_skipped = marks
    gradient = np.full(4096, 0x7F80 if dtype == np.uint16 else np.nan, dtype)
    assert session.compress("w", gradient) == 0
    session.receive(0, np.tile(session.payload(0), 2))
    session.decompress("w", gradient)  # in its own memory
    values = gradient.astype(np.uint32) << 16 if dtype == np.uint16 else gradient
    values = values.view(np.float32) if dtype == np.uint16 else values
    assert (values == (np.inf if marks else 0)).all()


def test_skipped_steps_do_not_move_a_warm_up():
    sessions = make_sessions(2, nonfinite="skip", warmup_steps=4, dense_steps=1)
    rng, ks = np.random.default_rng(0), []
    while sessions[0].last_step is None or sessions[0].last_step.step < 6:
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, spoil(gradients, [("fc.weight", 1)]))
        run(sessions, rng, 1)
        ks.append(int(sessions[0].last_step.k.sum()))
    assert ks == [round(share * ks[0]) for share in (1, 0.25, 0.125, 0.0625, 0.03125, 0.01)]
    assert sessions[0].skipped == 6


# Where nothing is compressed --------------------------------------------------------------------


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dense_steps": 2}], ids=str)
def test_without_compressed_layers_velocities_are_safe_all_the_same(n_ranks, nonfinite, options):
    options = {"nonfinite": nonfinite, "dense_below": 1 << 30, "momentum": 0.5} | options
    sessions = make_sessions(n_ranks, **options)
    assert sessions[0].routing.buckets == ()
    rng = np.random.default_rng(0)
    run(sessions, rng, 1)
    for bad in BAD:
        before = [frozen(session) for session in sessions]
        gradients = [draw_gradients(rng, session) for session in sessions]
        _, errors = step(sessions, spoil(gradients, [("fc.weight", n_ranks - 1)], bad), rng)
        assert len(errors) == (n_ranks if nonfinite == "raise" else 0)
        assert sessions[0].refused == (nonfinite == "skip")
        assert [frozen(session) for session in sessions] == before
        run(sessions, rng, 1)
    velocities = velocities_of(sessions[0])
    assert velocities.keys() == {layer.name for layer in LAYERS}
    assert all(np.isfinite(velocity).all() for velocity in velocities.values())


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_without_compressed_layers_and_velocities_steps_are_refused_as_ever(n_ranks, nonfinite):
    sessions = make_sessions(n_ranks, nonfinite=nonfinite, dense_below=1 << 30)
    gradients = [draw_gradients(np.random.default_rng(0), session) for session in sessions]
    sums, errors = step(sessions, spoil(gradients, [("fc.weight", 0)]))
    assert sessions[0].last_step is None
    if nonfinite == "raise":
        assert [error.where for error in errors] == [[("fc.weight", None)]] * n_ranks
    else:
        assert all(session.refused for session in sessions)
        assert not any(out["fc.weight"].any() for out in sums)
    run(sessions, np.random.default_rng(1), 1)
    assert sessions[0].last_step.step == 1
