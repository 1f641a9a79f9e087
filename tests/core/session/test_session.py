"""Whole steps of several ranks: agreement, conservation, balance, records."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.balancing.schedule import density_at
from hvd_dls.core.session.baselines import BASELINES
from tests.core.options import each_option
from tests.core.ranks import (
    LAYERS,
    SPARSE,
    contribution,
    copies,
    draw_gradients,
    k_of,
    make_sessions,
    run,
    same,
    send,
    step,
    velocities_of,
)
from tests.core.strategies import seeds

few = settings(max_examples=4)


def names_of(session):
    """Layers that are compressed, and those that go dense."""
    sparse = [layer.name for layer in session.plan.sparse]
    return sparse, [layer.name for layer in LAYERS if layer.name not in sparse]


def added(session, velocities, gradient):
    """What each layer's gradient adds to its residual, or to the weights if it goes dense."""
    return {n: contribution(session, velocities, n, g) for n, g in gradient.items()}


# Laws of every step -----------------------------------------------------------------------------


@each_option
@few
@given(seed=seeds, n_ranks=st.sampled_from([2, 3, 4]))
def test_ranks_agree_and_conserve_whatever_their_order_of_layers(options, seed, n_ranks):
    rng = np.random.default_rng(seed)
    sessions = make_sessions(n_ranks, **options)
    sparse, whole = names_of(sessions[0])
    for number in range(1, 7):
        gradients = [draw_gradients(rng, session) for session in sessions]
        contributions = [
            added(session, velocities_of(session), gradient)
            for session, gradient in zip(sessions, gradients, strict=True)
        ]
        before = [copies(session.residuals) for session in sessions]
        dense = sessions[0].dense_step
        sums, errors = step(sessions, gradients, rng)
        assert not errors
        assert all(same(out, sums[0]) for out in sums)
        for session in sessions:
            assert np.array_equal(session.agreed(), sessions[0].agreed())
            assert session.last_step.step == number
        for name in sparse if not dense else []:
            kept = zip(before, contributions, sessions, strict=True)
            sent = [r[name] + c[name] - s.residuals[name] for r, c, s in kept]
            for values, session in zip(sent, sessions, strict=True):
                k = dict(zip(sparse, session.last_step.k, strict=True))
                assert np.count_nonzero(values) <= k[name]
            assert np.array_equal(sums[0][name], np.sum(sent, axis=0))
        for name in whole if not dense else whole + sparse:
            assert np.array_equal(sums[0][name], np.sum([c[name] for c in contributions], axis=0))
        if dense:
            assert all(same(s.residuals, r) for s, r in zip(sessions, before, strict=True))


@each_option
def test_ranks_send_what_the_density_says(options):
    sessions = make_sessions(2, **options)
    plan, config, rng = sessions[0].plan, sessions[0].config, np.random.default_rng(1)
    if config.strategy == "hard":
        return
    wanted, sparse_steps = [], 0
    for _ in range(9):
        if sessions[0].dense_step:
            wanted.append(plan.sizes.sum())
        else:
            density = density_at(config, sparse_steps)
            wanted.append(plan.budget(density) + plan.fixed_k(config, density).sum())
            sparse_steps += 1
        run(sessions, rng, 1)
        for session in sessions:
            assert session.last_step.k.sum() == wanted[-1]
            if config.strategy not in BASELINES:
                assert np.array_equal(session.last_step.k, sessions[0].last_step.k)
    assert wanted[-1] == plan.budget(config.density) + plan.fixed_k(config, config.density).sum()


@each_option
def test_nothing_is_lost_over_many_steps(options):
    rng = np.random.default_rng(0)
    sessions = make_sessions(2, **options)
    sparse, whole = names_of(sessions[0])
    given_, received = (dict.fromkeys(sparse + whole, 0.0) for _ in range(2))
    for _ in range(14):
        gradients = [draw_gradients(rng, session) for session in sessions]
        for session, gradient in zip(sessions, gradients, strict=True):
            for name, values in added(session, velocities_of(session), gradient).items():
                given_[name] += values.astype(float)
        sums, _ = step(sessions, gradients, rng)
        for name, values in sums[0].items():
            received[name] += values
    for name in sparse:
        kept = sum(session.residuals[name].astype(float) for session in sessions)
        assert np.array_equal(received[name] + kept, given_[name])
    for name in whole:
        assert np.array_equal(received[name], given_[name])


@pytest.mark.parametrize("values", ["float16", "bfloat16"])
def test_what_rounding_takes_from_a_value_stays_in_the_residual(values):
    rng = np.random.default_rng(0)
    sessions = make_sessions(2, values=values, density=0.05)
    for _ in range(5):
        gradients = [
            {n: rng.standard_normal(g.shape).astype(np.float32) for n, g in drawn.items()}
            for drawn in (draw_gradients(rng, session) for session in sessions)
        ]
        before = [copies(session.residuals) for session in sessions]
        sums, _ = step(sessions, gradients)
        for name in SPARSE:
            accumulated = [r[name] + g[name] for r, g in zip(before, gradients, strict=True)]
            sent = [a - s.residuals[name] for a, s in zip(accumulated, sessions, strict=True)]
            assert np.array_equal(sums[0][name], sent[0] + sent[1])
            kept = [s.residuals[name][x != 0] for s, x in zip(sessions, sent, strict=True)]
            assert any(values.any() for values in kept)
        assert same(*sums)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("strategy", ["dls", "layerwise"])
def test_density_one_is_the_plain_sum_in_rank_order(itemsize, strategy):
    rng = np.random.default_rng(1)
    layers = [layer_spec(x.name, x.shape, itemsize=itemsize) for x in LAYERS]
    sessions = make_sessions(3, layers, density=1.0, strategy=strategy)
    for _ in range(3):
        gradients = [
            {name: rng.standard_normal(g.shape).astype(g.dtype) for name, g in drawn.items()}
            for drawn in (draw_gradients(rng, session) for session in sessions)
        ]
        sums, _ = step(sessions, gradients, rng)
        for name in SPARSE:
            work = sums[0][name].dtype
            a, b, c = (gradient[name].astype(work) for gradient in gradients)
            assert np.array_equal(sums[0][name], a + b + c)
            assert not any(session.residuals[name].any() for session in sessions)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_sums_and_residuals_have_the_work_dtype(itemsize):
    layers = [layer_spec(x.name, x.shape, itemsize=itemsize) for x in LAYERS]
    sessions = make_sessions(2, layers)
    out = run(sessions, np.random.default_rng(0), 2)
    work = np.float64 if itemsize == 8 else np.float32
    assert {values.dtype for values in out.values()} == {np.dtype(work)}
    assert {values.dtype for values in sessions[0].residuals.values()} == {np.dtype(work)}


@pytest.mark.parametrize("options", [{}, {"pair_steps": 4}], ids=str)
def test_layers_missing_in_a_step_keep_their_k_and_residual(options):
    rng = np.random.default_rng(2)
    sessions = make_sessions(2, **options)
    budget = sessions[0].plan.budget(sessions[0].config.density)
    for present in (SPARSE, SPARSE[:2], SPARSE[2:], SPARSE[:1], SPARSE[1:], SPARSE):
        k, residuals = k_of(sessions[0]), copies(sessions[0].residuals)
        gradients = [draw_gradients(rng, session) for session in sessions]
        step(sessions, [{name: g[name] for name in present} for g in gradients], rng)
        assert k_of(sessions[0]) == k_of(sessions[1])
        assert sum(k_of(sessions[0]).values()) == budget
        for name in set(SPARSE) - set(present):
            assert k_of(sessions[0])[name] == k[name]
            assert np.array_equal(sessions[0].residuals[name], residuals[name])


def test_dense_layers_are_not_the_session_s():
    session, _ = make_sessions(2)
    assert [layer.name for layer in LAYERS if session.is_sparse(layer.name)] == SPARSE


def test_one_rank_has_nothing_to_do():
    (session,) = make_sessions(1)
    assert not any(session.is_sparse(layer.name) for layer in LAYERS)
    assert session.last_step is None


@pytest.mark.parametrize(
    ("options", "steps"), [({}, 5), ({"pair_steps": 4}, 30), ({"pair_steps": 1}, 50)], ids=str
)
def test_thresholds_become_one_and_stay_so(options, steps):
    sessions = make_sessions(2, measure_every=1, **options)
    rng = np.random.default_rng(3)
    run(sessions, rng, 1)
    assert sessions[0].last_step.threshold_spread() > 30
    run(sessions, rng, steps)
    energies = []
    for _ in range(30):
        run(sessions, rng, 1)
        assert sessions[0].last_step.threshold_spread() < 1.5
        energies.append(sessions[0].last_step.quality.energy)
    assert np.mean(energies) > 0.97


def test_layerwise_thresholds_stay_apart():
    sessions = make_sessions(2, strategy="layerwise")
    run(sessions, np.random.default_rng(3), 50)
    assert sessions[0].last_step.threshold_spread() > 30


# What happened, as a record ---------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 1, 3])
def test_records_tell_what_happened(every):
    rng = np.random.default_rng(4)
    sessions = make_sessions(2, measure_every=every)
    for number in range(1, 7):
        gradients = [draw_gradients(rng, session) for session in sessions]
        own = sessions[0]
        accumulators = {name: own.residuals[name] + gradients[0][name] for name in SPARSE}
        k = k_of(own)
        sent = send(copy.deepcopy(own), gradients[0], SPARSE)
        payload_bytes = sum(map(len, sent.payloads.values()))
        step(sessions, gradients)
        record = own.last_step
        assert record.names == tuple(SPARSE)
        assert record.sizes.tolist() == [2400, 18_432, 1280, 46_080]
        assert record.sparse_bytes == payload_bytes
        assert record.dense_bytes == 4 * (32 + 40)
        falling = [np.sort(np.abs(accumulators[name]))[::-1] for name in SPARSE]
        sent = np.concatenate([a[: k[name]] for name, a in zip(SPARSE, falling, strict=True)])
        thresholds = [a[k[name] - 1] for name, a in zip(SPARSE, falling, strict=True)]
        assert record.thresholds.tolist() == thresholds
        if every and number % every == 0:
            best = np.sort(np.concatenate(falling))[::-1][
                : own.plan.budget(sessions[0].config.density)
            ]
            energy = np.square(sent, dtype=float).sum() / np.square(best, dtype=float).sum()
            assert record.quality.energy == pytest.approx(energy)
        else:
            assert record.quality is None


def test_gathered_buffers_may_be_used_again_after_the_step():
    sessions = make_sessions(2)
    gradients = [draw_gradients(np.random.default_rng(rank), sessions[0]) for rank in range(2)]
    others = copy.deepcopy(sessions)
    step(sessions, gradients)
    payloads = [send(s, g, SPARSE) for s, g in zip(others, gradients, strict=True)]
    gathered = {
        b: np.concatenate([sent.payloads[b] for sent in payloads]) for b in payloads[0].payloads
    }
    for bucket, buffer in gathered.items():
        others[0].receive(bucket, buffer)
    for name in SPARSE:
        others[0].decompress(name, gradients[0][name])  # in the gradient's own memory
    for buffer in gathered.values():
        buffer[:] = 0
    assert k_of(others[0]) == k_of(sessions[0])
    assert same(others[0].residuals, sessions[0].residuals)
